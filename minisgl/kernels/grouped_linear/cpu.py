"""Products with weights of 4 and 8 bits on CPU: csrc/cpu/grouped.cpp, for weights in panels."""

import torch

from minisgl.device.tape import by_call, empty
from minisgl.kernels.grouped_linear import grouped_linear_reference
from minisgl.kernels.grouped_linear.panels import GroupedPanels
from minisgl.kernels.grouped_linear.weights import BLOCK, Grouped
from minisgl.kernels.native import address, model_ops

grouped_linear_twin = by_call(grouped_linear_reference)


def grouped_linear_cpu(
    x: torch.Tensor,
    weight: Grouped | GroupedPanels,
    bias: torch.Tensor | None = None,
    wide: bool = False,
) -> torch.Tensor:
    """See `grouped_linear_reference`; with panels a row's result does not depend on the others."""
    native = model_ops(x, bias)
    n, k = weight.shape
    fits = x.shape[-1] == k and (bias is None or (bias.shape == (n,) and bias.is_contiguous()))
    if native is None or not fits or not isinstance(weight, GroupedPanels):
        return grouped_linear_twin(x, weight, bias, wide)
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, k).contiguous()
    y = empty((*x.shape[:-1], n), torch.float32 if wide else x.dtype)
    rounded: tuple[torch.Tensor | None, ...] = (None, None, None)
    if weight.activations == "int8":
        blocks = len(rows), k // BLOCK
        scales, sums = (empty(blocks, torch.float32) for _ in range(2))
        rounded = empty((len(rows), k), torch.int8), scales, sums
    native.grouped_linear(
        rows.data_ptr(),
        rows.stride(0),
        *weight.addresses,
        address(bias),
        *map(address, rounded),
        y.data_ptr(),
        len(rows),
        *weight.layout,
        x.dtype == torch.bfloat16,
        wide,
        torch.get_num_threads(),
    )
    return y
