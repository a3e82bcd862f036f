"""Gated activations on CPU, in one pass."""

import torch

from minisgl.device.tape import by_call, empty
from minisgl.kernels.activation import gelu_tanh_and_mul_reference, silu_and_mul_reference
from minisgl.kernels.native import model_ops

silu_and_mul_twin = by_call(silu_and_mul_reference)
gelu_tanh_and_mul_twin = by_call(gelu_tanh_and_mul_reference)


def silu_and_mul_cpu(x: torch.Tensor) -> torch.Tensor:
    """See `silu_and_mul_reference`."""
    y = _gated(x, gelu=False)
    return silu_and_mul_twin(x) if y is None else y


def gelu_tanh_and_mul_cpu(x: torch.Tensor) -> torch.Tensor:
    """See `gelu_tanh_and_mul_reference`."""
    y = _gated(x, gelu=True)
    return gelu_tanh_and_mul_twin(x) if y is None else y


def _gated(x: torch.Tensor, gelu: bool) -> torch.Tensor | None:
    native = model_ops(x)
    if native is None or not x.is_contiguous():
        return None
    n = x.shape[-1] // 2
    y = empty((*x.shape[:-1], n), x.dtype)
    if n:
        native.gated(
            x.data_ptr(),
            2 * n,
            y.data_ptr(),
            y.numel() // n,
            n,
            gelu,
            x.dtype == torch.bfloat16,
            torch.get_num_threads(),
        )
    return y
