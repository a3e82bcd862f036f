"""The weights of products in all their forms, so that layers need not know which one they have.

Dense ones are of the room `linear`, those of 4 or 8 bits of the room `grouped_linear`.
"""

from typing import Any

import torch

from minisgl.kernels.grouped_linear import Quantized, blocks, grouped_linear
from minisgl.kernels.grouped_linear import panels as grouped_panels
from minisgl.kernels.grouped_linear.weights import Grouped
from minisgl.kernels.linear import linear, panels
from minisgl.kernels.linear.panels import Dense, Panels

Matrix = Dense | Quantized  # [..., N, K]


def product(
    x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None, wide: bool = False
) -> Any:
    """x W^T + b, by the op of the weight's kind; see `linear_reference`."""
    op = grouped_linear if isinstance(weight, Quantized) else linear
    return op(x, weight, bias, wide)


def packed(weight: Matrix) -> Matrix:
    """A weight in the form that products on its device read fastest; it may be made in its place,
    and is then gone."""
    if not isinstance(weight, Grouped):
        return weight if isinstance(weight, Quantized) else panels.packed(weight)
    form = blocks if weight.device.type == "cuda" else grouped_panels
    return form.packed(weight)  # type: ignore[no-any-return]


def unpacked(weight: Matrix) -> torch.Tensor:
    """The weights [..., N, K] in the type that they stand for, copied where they are not so."""
    if isinstance(weight, Quantized):
        whole = weight if isinstance(weight, Grouped) else weight.unpacked()
        return whole.dequantized(weight.dtype)
    return panels.unpacked(weight)


def tensors(value: object) -> tuple[torch.Tensor, ...]:
    """What a weight of any form holds in memory; of anything else nothing."""
    if isinstance(value, torch.Tensor):
        return (value,)
    return value.tensors if isinstance(value, Panels | Quantized) else ()
