"""Linear layer with a weight of 4 or 8 bits: y = x W^T + b, W = scale * code + minimum by groups.

Products are summed in fp32 whatever the type; the result is rounded once. Where the weight says so,
x is rounded to 8 bits first: on a CPU products of whole numbers are the fastest. On a GPU weights
may be rounded to x's type on the way, which its tensor cores multiply.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from minisgl.kernels.grouped_linear.blocks import INT8_ACTIVATIONS, GroupedBlocks
from minisgl.kernels.grouped_linear.panels import GroupedPanels
from minisgl.kernels.grouped_linear.weights import BLOCK, Grouped, quantized
from minisgl.kernels.op import Case, Cost, Expected, Implementation, Op

Quantized = Grouped | GroupedPanels | GroupedBlocks


def rounded_to_int8(x: torch.Tensor) -> torch.Tensor:
    """x [..., K] as products of integers take it: in blocks of 32, the nearest of the multiples, up
    to 127 times, of a 127th of the largest. In fp32 whatever x is, so that all agree on them."""
    blocks = x.to(torch.float32).unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(largest > 2.0**-120, torch.full_like(largest, 127.0) / largest, 0.0)
    return ((blocks * inverse).round() * (largest / 127.0).to(x.dtype)).flatten(-2)


def grouped_linear_reference(
    x: torch.Tensor,
    weight: Quantized,
    bias: torch.Tensor | None = None,
    wide: bool = False,
) -> torch.Tensor:
    """x: [..., K] and bias [N] of one type, weight [N, K]. Returns [..., N] in x's type, or in fp32
    with `wide`: for logits. Weights that floats are multiplied with may be rounded to their
    type first, as here."""
    weight = weight if isinstance(weight, Grouped) else weight.unpacked()
    if weight.activations == "int8":
        inputs = rounded_to_int8(x.float())
        matrix = weight.dequantized(inputs.dtype)
    else:
        inputs, matrix = x.float(), weight.dequantized(x.dtype).float()
    y = F.linear(inputs, matrix, None if bias is None else bias.float())
    return y if wide else y.to(x.dtype)


def grouped_linear_cost(x: torch.Tensor, weight: Quantized, wide: bool = False, **_: Any) -> Cost:
    n, k = weight.shape
    outputs = x.numel() // k * n
    written = outputs * (4 if wide else x.element_size())
    read = x.nbytes + sum(tensor.nbytes for tensor in weight.tensors)
    return Cost(bytes=read + written, flops=2 * outputs * k)


def _case(
    rows: tuple[int, ...],
    inputs: int,
    outputs: int,
    *,
    bits: int,
    group: int = 32,
    bias: bool = False,
    wide: bool = False,
    int8: bool = False,
) -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=generator.device).to(device)

        activations = "int8" if int8 and dtype == torch.bfloat16 else "float"
        weight = quantized(normal(outputs, inputs) * inputs**-0.5, bits, group)
        return {
            "x": normal(*rows, inputs).to(dtype),
            "weight": replace(weight, dtype=dtype, activations=activations),
            "bias": normal(outputs).to(dtype) if bias else None,
            "wide": wide,
        }

    label = "x".join(str(size) for size in rows) + f"-K{inputs}-N{outputs}-{bits}bits-G{group}"
    marks = {"bias": bias, "wide": wide, "int8": int8}
    return Case("-".join([label, *(mark for mark, on in marks.items() if on)]), make)


CASES = (
    _case((1,), 64, 96, bits=4),
    _case((7,), 1024, 131, bits=4, bias=True),
    _case((3, 5), 128, 257, bits=8, bias=True, wide=True),
    _case((65,), 320, 200, bits=4, group=64),
    _case((200,), 128, 33, bits=8, group=128, bias=True),
    _case((2, 97), 96, 50, bits=4, wide=True),
    _case((0,), 64, 32, bits=8),
    _case((3,), 256, 5, bits=8, group=256),
    _case((1,), 64, 96, bits=4, int8=True),
    _case((7,), 1024, 131, bits=4, bias=True, int8=True),
    _case((3, 5), 128, 257, bits=8, bias=True, wide=True, int8=True),
    _case((200,), 128, 33, bits=8, group=128, bias=True, int8=True),
    _case((2, 97), 96, 50, bits=4, wide=True, int8=True),
    _case((2,), 2080, 40, bits=4, bias=True),
)


def _fp32(facts: Mapping[str, Any]) -> bool:
    return bool(facts["x_ptr"] == "*fp32")


def _refusal(*, weight: Quantized, **_: Any) -> str | None:
    return INT8_ACTIVATIONS if weight.activations == "int8" else None


grouped_linear = Op(
    "grouped_linear",
    grouped_linear_reference,
    implementations=[
        Implementation(
            "portable",
            "cuda",
            "minisgl.kernels.grouped_linear.portable:grouped_linear_portable",
            refusal=_refusal,
        ),
        Implementation("cpu", "cpu", "minisgl.kernels.grouped_linear.cpu:grouped_linear_cpu"),
    ],
    cases=CASES,
    cost=grouped_linear_cost,
    expected=[
        Expected("few_rows_kernel", ("load128",)),
        Expected("tiles_kernel", ("wgmma",), lambda facts: facts["arch"] >= 90),
        Expected("tiles_kernel", ("mma",), lambda facts: facts["arch"] < 90 and not _fp32(facts)),
    ],
)
