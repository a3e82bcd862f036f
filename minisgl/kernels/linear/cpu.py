"""Linear layers on CPU. PyTorch's own are slow in bf16 where the CPU has no bf16 arithmetic."""

import torch

from minisgl.kernels.linear import linear_reference
from minisgl.kernels.native import address, model_ops


def linear_cpu(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, wide: bool = False
) -> torch.Tensor:
    """See `linear_reference`. A row's result does not depend on the rows beside it."""
    native = model_ops(x, weight, bias)
    if native is None or not weight.is_contiguous():
        return linear_reference(x, weight, bias, wide)
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, x.shape[-1]).contiguous()
    n, k = weight.shape
    y = torch.empty(*x.shape[:-1], n, dtype=torch.float32 if wide else x.dtype)
    native.linear(
        rows.data_ptr(),
        rows.stride(0),
        weight.data_ptr(),
        address(bias),
        y.data_ptr(),
        rows.shape[0],
        n,
        k,
        x.dtype == torch.bfloat16,
        wide,
        torch.get_num_threads(),
    )
    return y
