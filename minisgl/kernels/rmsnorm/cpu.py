"""RMSNorm on CPU, row by row in one pass."""

import torch

from minisgl.device.tape import by_call, empty
from minisgl.kernels.native import address, model_ops
from minisgl.kernels.rmsnorm import rmsnorm_reference

rmsnorm_twin = by_call(rmsnorm_reference)


def rmsnorm_cpu(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    unit_offset: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `rmsnorm_reference`."""
    native = model_ops(x, weight, residual)
    n = x.shape[-1]
    stride = _row_stride(x)
    other_stride = 0 if residual is None else _row_stride(residual)
    fits = weight.shape == (n,) and weight.is_contiguous()
    fits = fits and (residual is None or residual.shape == x.shape)
    if native is None or not fits or stride is None or other_stride is None:
        return rmsnorm_twin(x, weight, eps, residual, unit_offset)
    y = empty(x.shape, x.dtype)
    total = None if residual is None else empty(x.shape, x.dtype)
    native.rmsnorm(
        x.data_ptr(),
        stride,
        weight.data_ptr(),
        address(residual),
        other_stride,
        y.data_ptr(),
        address(total),
        x.numel() // n,
        n,
        eps,
        unit_offset,
        x.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    return y if total is None else (y, total)


def _row_stride(x: torch.Tensor) -> int | None:
    """Elements from row to row of x as a matrix; None where it is not one."""
    if x.is_contiguous():
        return x.shape[-1]
    return x.stride(0) if x.dim() == 2 and x.stride(1) == 1 else None
