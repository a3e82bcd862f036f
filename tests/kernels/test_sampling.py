"""Sampling beyond the cards' cases: both ways to a threshold, large vocabularies, the noise."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from minisgl.kernels.sampling import make_params, sample, sample_reference
from minisgl.kernels.sampling.noise import gumbel, hash_ids
from minisgl.kernels.sampling.portable import gumbel_noise, hash_bits, sample_portable
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
