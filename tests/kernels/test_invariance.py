"""Bit for bit: in a fixed order, a token's results do not depend on what is computed beside it."""

import pytest
import torch

from minisgl.kernels.attention.paged import PagedKV, paged_case
from minisgl.kernels.attention.portable import attention_portable
from minisgl.kernels.config import fixed_order, target
from minisgl.kernels.decode.portable import decode_portable, split_count
from minisgl.kernels.linear.persistent import linear_persistent
from minisgl.kernels.moe.portable import moe_experts_portable, moe_route_portable
from minisgl.kernels.op import Case
from minisgl.kernels.rmsnorm.portable import rmsnorm_portable
from minisgl.kernels.sampling import sample
from minisgl.kernels.sampling.portable import sample_portable

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fixed_order_on_hopper():
    with target(90), fixed_order():
        yield


def _sequence(dtype: torch.dtype, length: int, **facts):
    """One sequence's queries at every position, and its keys and values."""
    generator = torch.Generator().manual_seed(length)
    made = paged_case(length, [length], CPU, dtype, generator, head_dim=64, **facts)
    return made["q"], made["kv"]


def _repeated(kv: PagedKV, copies: int, length: int) -> PagedKV:
    """The first `length` tokens of the one sequence, as so many sequences."""
    lengths = torch.full((copies,), length, dtype=torch.int32)
    return kv._replace(rows=kv.rows.repeat(copies), seq_lens=lengths)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 40])
def test_attention_over_chunkings_and_batches(dtype, window):
    q, kv = _sequence(dtype, 137, window=window)

    def chunk(start: int, end: int, copies: int = 1) -> torch.Tensor:
        queries = torch.cat([q[start:end]] * copies)
        offsets = torch.arange(copies + 1, dtype=torch.int32) * (end - start)
        return attention_portable(queries, _repeated(kv, copies, end), offsets)

    whole = chunk(0, 137)
    parts = torch.cat([chunk(0, 50), chunk(50, 51), chunk(51, 137)])
    assert torch.equal(parts, whole)
    assert torch.equal(chunk(130, 137, copies=3)[-7:], whole[-7:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_and_verification_equal_prefill(dtype):
    q, kv = _sequence(dtype, 131)
    whole = attention_portable(q, kv, torch.tensor([0, 131], dtype=torch.int32))
    for width, copies in ((1, 1), (1, 3), (4, 2)):
        queries = torch.cat([q[-width:]] * copies)
        got = decode_portable(queries, _repeated(kv, copies, 131), width=width)
        assert torch.equal(got[-width:], whole[-width:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_over_batches(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 130, generator=generator).to(dtype)
    weight = torch.randn(70, 130, generator=generator).to(dtype)
    whole = linear_persistent(x, weight)
    for start, end in ((0, 1), (199, 200), (100, 180)):
        assert torch.equal(linear_persistent(x[start:end], weight), whole[start:end])


def test_experts_over_batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 64, generator=generator)
    gate_up = torch.randn(4, 64, 64, generator=generator) / 8
    down = torch.randn(4, 64, 32, generator=generator) / 6
    weights, ids = moe_route_portable(torch.randn(150, 4, generator=generator), 2, True)
    whole = moe_experts_portable(x, gate_up, down, weights, ids)
    for start, end in ((0, 1), (149, 150), (40, 90)):
        part = slice(start, end)
        got = moe_experts_portable(x[part], gate_up, down, weights[part], ids[part])
        assert torch.equal(got, whole[part])


def test_norms_over_batches():
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 37, 130, generator=generator)
    weight = torch.randn(130, generator=generator)
    whole = rmsnorm_portable(x, weight, 1e-6, residual)
    for start, end in ((0, 1), (36, 37), (5, 30)):
        part = rmsnorm_portable(x[start:end], weight, 1e-6, residual[start:end])
        assert all(torch.equal(a, b[start:end]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize("case", sample.cases, ids=lambda case: case.label)
def test_samples_over_batches(case: Case):
    given = case.make(CPU, torch.float32, torch.Generator().manual_seed(1))
    whole = sample_portable(**given)
    for n in range(0, len(whole), 3):
        rows = {name: given[name][n : n + 1] for name in ("logits", "rows", "positions")}
        assert torch.equal(sample_portable(**given | rows), whole[n : n + 1])


def test_split_counts_depend_on_shapes_alone():
    assert split_count(8, 132, 8192, 64) == 32
    assert split_count(512, 132, 8192, 64) == 1
    assert split_count(8, 132, 128, 64) == 2  # no more runs than tiles
    assert split_count(100_000, 132, 8192, 64) == 1
