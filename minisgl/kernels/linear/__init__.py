"""Linear layer: y = x W^T + b, with the weight as checkpoints store it, [out, in], or packed.

Products are summed in fp32 whatever the type; the result is rounded once.
"""

from typing import Any

import torch
import torch.nn.functional as F

from minisgl.kernels.linear.panels import Dense, unpacked
from minisgl.kernels.op import Case, Cost, Expected, Implementation, Op


def linear_reference(
    x: torch.Tensor, weight: Dense, bias: torch.Tensor | None = None, wide: bool = False
) -> torch.Tensor:
    """x: [..., K], weight: [N, K], bias: [N], all of one type. Returns [..., N] in that type.

    With `wide` it is returned in fp32, which may or may not have been rounded to x's type on the
    way: for logits.
    """
    y = F.linear(x, unpacked(weight), bias)
    return y.float() if wide else y


def linear_cost(x: torch.Tensor, weight: Dense, wide: bool = False, **_: Any) -> Cost:
    n, k = weight.shape
    outputs = x.numel() // k * n
    read = (x.numel() + n * k) * x.element_size()
    written = outputs * (4 if wide else x.element_size())
    return Cost(bytes=read + written, flops=2 * outputs * k)


def _case(
    rows: tuple[int, ...], inputs: int, outputs: int, *, bias: bool = False, wide: bool = False
) -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        def normal(*size: int) -> torch.Tensor:
            values = torch.randn(*size, generator=generator, device=generator.device)
            return values.to(device, dtype)

        return {
            "x": normal(*rows, inputs),
            "weight": normal(outputs, inputs) * inputs**-0.5,
            "bias": normal(outputs) if bias else None,
            "wide": wide,
        }

    label = "x".join(str(size) for size in rows) + f"-K{inputs}-N{outputs}"
    marks = {"bias": bias, "wide": wide}
    return Case("-".join([label, *(mark for mark, on in marks.items() if on)]), make)


CASES = (
    _case((1,), 64, 96),
    _case((7,), 1023, 131, bias=True),
    _case((16,), 33, 5),
    _case((13,), 31, 64, wide=True),
    _case((3, 5), 128, 257, bias=True, wide=True),
    _case((65,), 320, 200),
    _case((200,), 48, 33, bias=True),
    _case((2, 97), 40, 50, wide=True),
    _case((0,), 64, 32),
    _case((6,), 1024, 131, bias=True),
)

linear = Op(
    "linear",
    linear_reference,
    implementations=[
        Implementation("cublas", "cuda", "minisgl.kernels.linear:linear_reference"),
        Implementation("persistent", "cuda", "minisgl.kernels.linear.persistent:linear_persistent"),
        Implementation("cpu", "cpu", "minisgl.kernels.linear.cpu:linear_cpu"),
    ],
    cases=CASES,
    cost=linear_cost,
    expected=[Expected("linear_kernel", ("load128", "wgmma"))],
)
