"""The repaired interpreter computes bf16 as a GPU does; every other kernel test rests on it."""

import pytest
import torch
import triton
import triton.language as tl

BINARY = {
    "add": torch.add,
    "mul": torch.mul,
    "maximum": torch.maximum,
    "where": torch.maximum,
    "div": torch.div,
}


@triton.jit
def _binary(x_ptr, y_ptr, out_ptr, N: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    y = tl.load(y_ptr + i)
    if OP == "add":
        z = x + y
    elif OP == "mul":
        z = x * y
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "where":
        z = tl.where(x > y, x, y)
    else:
        z = (x / y).to(x.dtype)
    tl.store(out_ptr + i, z)


@triton.jit
def _unary(x_ptr, out_ptr, N: tl.constexpr, OP: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    if OP == "neg":
        z = -x
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "half":
        z = x * 0.5
    else:
        z = x
    tl.store(out_ptr + i, z)


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    tl.store(out_ptr + m[:, None] * N + n[None, :], tl.dot(a, b))


@triton.jit
def _reduce(x_ptr, out_ptr, length_ptr, N: tl.constexpr):
    n = tl.load(length_ptr)
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i, mask=i < n, other=-1.0)
    total = 0.0
    for _ in range(n):
        total += 1.0
    tl.store(out_ptr, tl.max(x, 0).to(tl.float32))
    tl.store(out_ptr + 1, tl.sum(x, 0).to(tl.float32))
    tl.store(out_ptr + 2, total)


@triton.jit
def _bits(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    word = tl.load(x_ptr + i).to(tl.int16, bitcast=True)
    tl.store(out_ptr + i, word.to(tl.bfloat16, bitcast=True))


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("op", BINARY)
def test_binary(op):
    x, y, out = bf16(256), bf16(256, seed=1), torch.full((256,), float("nan")).bfloat16()
    _binary[(1,)](x, y, out, N=256, OP=op)
    assert torch.equal(out, BINARY[op](x, y))


@pytest.mark.parametrize(
    ("op", "expected"),
    [("neg", torch.neg), ("abs", torch.abs), ("half", lambda x: x * 0.5), ("copy", torch.clone)],
)
def test_unary(op, expected):
    x, out = bf16(256), torch.full((256,), float("nan")).bfloat16()
    _unary[(1,)](x, out, N=256, OP=op)
    assert torch.equal(out, expected(x))


@pytest.mark.parametrize("source", [torch.float32, torch.float16])
def test_conversion_rounds_to_nearest_even(source):
    x = (torch.randn(4096, generator=torch.Generator().manual_seed(3)) * 8).to(source)
    x[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    out = torch.zeros(4096).bfloat16()
    _unary[(1,)](x, out, N=4096, OP="copy")
    assert torch.equal(out.view(torch.int16)[1:], x.bfloat16().view(torch.int16)[1:])
    assert out[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot(dtype):
    a, b = bf16(16, 64).to(dtype), bf16(64, 32, seed=1).to(dtype)
    out = torch.full((16, 32), float("nan"))
    _dot[(1,)](a, b, out, M=16, N=32, K=64)
    torch.testing.assert_close(out, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)


def test_reduction_and_loop_over_a_loaded_length():
    x, out = bf16(64), torch.full((3,), float("nan"))
    _reduce[(1,)](x, out, torch.tensor([40], dtype=torch.int32), N=64)
    assert out[0] == x[:40].float().max()
    torch.testing.assert_close(out[1], x[:40].float().sum() - 24.0, rtol=1e-2, atol=1e-2)
    assert out[2] == 40.0


def test_bitcast_keeps_the_words():
    x, out = bf16(64), torch.zeros(64).bfloat16()
    _bits[(1,)](x, out, N=64)
    assert torch.equal(out, x)
