"""Sampling beyond the cards' cases: both ways to a threshold, large vocabularies, the noise."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from minisgl.kernels.sampling import make_params, portable, sample, sample_reference
from minisgl.kernels.sampling.noise import gumbel, hash_ids
from minisgl.kernels.sampling.portable import draw_kernel, sample_portable
from minisgl.kernels.sampling.rows import gumbel_noise, hash_bits
from tests.kernels.cards import poisoned


@triton.jit
def _noise(bits_ptr, noise_ptr, low_ptr, high_ptr, N: tl.constexpr):
    ids = tl.arange(0, N)
    low = tl.load(low_ptr).to(tl.uint32, bitcast=True)
    high = tl.load(high_ptr).to(tl.uint32, bitcast=True)
    tl.store(bits_ptr + ids, hash_bits(low, high, ids))
    tl.store(noise_ptr + ids, gumbel_noise(low, high, ids))


def test_noise_is_the_reference_s_bit_for_bit():
    count = 16384
    low, high = torch.tensor([-1234567], dtype=torch.int32), torch.tensor([99], dtype=torch.int32)
    bits, noise = torch.empty(count, dtype=torch.int32), torch.full((count,), torch.nan)
    _noise[(1,)](bits, noise, low, high, N=count)
    ids = torch.arange(count, dtype=torch.int32)
    assert torch.equal(bits, hash_ids(low, high, ids))
    torch.testing.assert_close(noise, gumbel(low, high, ids), rtol=1e-5, atol=1e-6)


# The gathered values are too few for every filter, or for some of them: the row is searched.
@pytest.mark.parametrize("capacity", [1, 16, 64])
@pytest.mark.parametrize("label", ["top-k", "top-p", "min-p"])
def test_few_gathered_values_change_nothing(label, capacity):
    case = next(case for case in sample.cases if case.label == label)
    generator = torch.Generator().manual_seed(capacity)
    arguments = case.make(torch.device("cpu"), torch.float32, generator)
    with poisoned():
        got = sample_portable(**arguments, capacity=capacity)
    assert torch.equal(got, sample_reference(**arguments))


def _row_arguments(logits: torch.Tensor, **fields) -> dict:
    count = len(logits)
    return {
        "logits": logits,
        "rows": torch.arange(count, dtype=torch.int32),
        "positions": torch.arange(count) * 1000 + 2**33,
        "params": make_params(count, **fields),
    }


def test_several_pieces_of_a_large_vocabulary():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 20_011, generator=generator) * 4
    logits[1, 19_000] = 40.0
    arguments = _row_arguments(
        logits,
        temperature=np.array([0.0, 1.0, 0.7, 1.5, 1.0]),
        top_k=np.array([0, 0, 0, 50, 0]),
        top_p=np.array([1.0, 1.0, 0.9, 1.0, 1.0]),
        min_p=np.array([0.0, 0.0, 0.0, 0.0, 0.1]),
    )
    with poisoned():
        got = sample_portable(**arguments)
    assert torch.equal(got, sample_reference(**arguments))


def _flat_rows(vocab: int) -> dict:
    """Rows whose filters end far below their 1,024 largest values, or among equal ones."""
    generator = torch.Generator().manual_seed(3)

    def normal(sigma: float) -> torch.Tensor:
        return torch.randn(vocab, generator=generator) * sigma

    def uniform(width: float) -> torch.Tensor:
        return torch.rand(vocab, generator=generator) * width - 5

    half = normal(1.0).masked_fill(torch.rand(vocab, generator=generator) < 0.5, -torch.inf)
    few = torch.full((vocab,), -torch.inf)
    few[7::1500] = 1.5
    rows = [
        (normal(3.75), {"top_p": 0.9}),
        (normal(3.0), {"top_p": 0.95}),
        (normal(0.1), {"top_p": 0.999999}),
        (normal(1.0), {"top_p": 1e-3}),
        (normal(1.0), {"top_p": 0.9, "temperature": 0.01}),
        (normal(1.0), {"top_p": 0.5, "temperature": 100.0}),
        (normal(2.0).bfloat16().float(), {"top_p": 0.8}),
        (half, {"top_p": 0.99}),
        (torch.full((vocab,), -2.5), {"top_p": 0.5}),
        (torch.full((vocab,), -2.5), {"top_k": 50}),
        ((uniform(1.0) > -4.4).float(), {"top_p": 0.5}),
        ((uniform(1.0) > -4.4).float(), {"top_k": vocab - 3}),
        (uniform(0.1), {"top_k": 1}),
        (uniform(0.1), {"top_k": vocab // 2}),
        (uniform(0.1), {"top_k": 300, "top_p": 0.5}),
        (uniform(0.1), {"top_k": 300, "top_p": 0.5, "min_p": 0.99}),
        (uniform(60.0), {"top_k": vocab - 1}),
        (uniform(60.0), {"top_k": vocab - 1, "top_p": 0.9}),
        (normal(0.5), {"min_p": 0.01}),
        (normal(0.5), {"min_p": 0.01, "top_p": 0.7}),
        (few, {"top_k": 50}),
        (half, {"top_k": vocab - 1, "top_p": 0.5}),
        (half, {"top_k": vocab - 1, "top_p": 0.01}),
        (few, {"top_k": 50, "top_p": 0.5}),
    ]
    names = ("temperature", "top_k", "top_p", "min_p")
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    fields = {name: np.array([(neutral | row)[name] for _, row in rows]) for name in names}
    return _row_arguments(torch.stack([logits for logits, _ in rows]), **fields)


@pytest.mark.parametrize("vocab", [3000, 40_011])
def test_flat_and_tied_rows_are_not_left_to_one_program(vocab, monkeypatch):
    """`draw` is given a row of NaN: reading any of it would show. So a row is read four times at
    most, each time by a program for every piece."""
    arguments = _flat_rows(vocab)

    class Blind:
        def __getitem__(self, grid):
            def launch(logits, *args, **constants):
                draw_kernel[grid](torch.full_like(logits, torch.nan), *args, **constants)

            return launch

    monkeypatch.setattr(portable, "draw_kernel", Blind())
    for offset in range(0, 12, 4):  # other noise, other tokens
        moved = arguments | {"positions": arguments["positions"] + offset}
        with poisoned():
            got = sample_portable(**moved)
        assert got.tolist() == sample_reference(**moved).tolist()


@pytest.mark.parametrize(
    "fields", [{"top_p": 0.4}, {"top_k": 2000}, {"top_k": 2000, "top_p": 0.4}], ids=str
)
def test_more_values_in_a_part_than_can_be_gathered(fields):
    """Two neighbouring floats, 1,500 times each, and a third far above: the row is searched."""
    logits = torch.full((1, 3001), 1.0)
    logits[0, ::2] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    logits[0, 17] = 3.0
    arguments = _row_arguments(logits.repeat(8, 1), **fields)
    with poisoned():
        got = sample_portable(**arguments)
    assert got.tolist() == sample_reference(**arguments).tolist()


@pytest.mark.parametrize("capacity", [16, 40, 64])
@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.7])
def test_a_top_k_beyond_the_values_there_are(capacity, top_p):
    """Then top-p is of the mass of all, also where the gathered ones are enough for it."""
    logits = torch.randn(20, 200, generator=torch.Generator().manual_seed(1))
    logits[:, 90:] = -torch.inf
    arguments = _row_arguments(logits, top_k=150, top_p=top_p)
    with poisoned():
        got = sample_portable(**arguments, capacity=capacity)
    assert got.tolist() == sample_reference(**arguments).tolist()


def test_more_equal_values_than_fit_where_eighths_are_lost():
    """Of z = 3e6 the cutoff is rounded down to the values themselves: none is written beyond the
    memory of its row."""
    count, capacity = 4, 16
    arguments = _row_arguments(torch.full((count, 200), 30.0), temperature=1e-5, top_p=0.9)
    with poisoned():
        got = sample_portable(**arguments, capacity=capacity)
    assert got.tolist() == sample_reference(**arguments).tolist()


def test_rows_with_one_token_or_none_left():
    logits = torch.full((4, 77), -torch.inf)
    logits[0, 5] = logits[1, 76] = -3.0
    arguments = _row_arguments(logits, top_p=np.array([1.0, 0.5, 1.0, 0.5]))
    with poisoned():
        got = sample_portable(**arguments)
    assert got[:2].tolist() == [5, 76]
    assert all(0 <= token < 77 for token in got[2:].tolist())


def test_a_token_does_not_depend_on_its_batch():
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(6, 300, generator=generator) * 3
    arguments = _row_arguments(logits, top_k=np.array([0, 5, 0, 9, 0, 0]))
    together = sample_portable(**arguments)
    order = torch.tensor([4, 1, 3])
    alone = sample_portable(
        logits[order], arguments["rows"][order], arguments["positions"][order], arguments["params"]
    )
    assert torch.equal(alone, together[order])


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.1])
    draws = 120
    arguments = _row_arguments(probabilities.log().repeat(draws, 1))
    tokens = sample_portable(**arguments)
    expected = probabilities * draws
    observed = torch.bincount(tokens, minlength=len(probabilities))
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 16.27  # 0.999 quantile with 3 degrees of freedom
