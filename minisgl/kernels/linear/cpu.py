"""Linear layers on CPU.

Weights in panels, as all of a model in bf16 are, have a native product of their own. Of others few
rows are multiplied by the native product that reads the weights as they are; many by PyTorch's, in
fp32 where the CPU has no bf16 arithmetic, without which it is slow.
"""

import torch
import torch.nn.functional as F

from minisgl.device.tape import by_call, empty
from minisgl.kernels.config import batch_invariant
from minisgl.kernels.linear import linear_reference
from minisgl.kernels.linear.panels import Dense, Panels
from minisgl.kernels.native import address, model_ops

linear_twin = by_call(linear_reference)
MANY_ROWS = 192  # from here on, widening the weights to fp32 for PyTorch costs less than it gains
BLOCK = 2**22  # weights widened at a time: they stay in the last cache


def linear_cpu(
    x: torch.Tensor, weight: Dense, bias: torch.Tensor | None = None, wide: bool = False
) -> torch.Tensor:
    """See `linear_reference`. With panels, among few rows, or under `fixed_order`, one's result
    does not depend on the others."""
    values = weight.values if isinstance(weight, Panels) else weight
    native = model_ops(x, values, bias)
    n, k = weight.shape
    fits = x.shape[-1] == k and (bias is None or (bias.shape == (n,) and bias.is_contiguous()))
    if native is None or not fits or not values.is_contiguous():
        return linear_twin(x, weight, bias, wide)
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, k).contiguous()
    if isinstance(weight, Panels):
        y = empty((*x.shape[:-1], n), torch.float32 if wide else x.dtype)
        native.linear_panels(
            rows.data_ptr(),
            rows.stride(0),
            values.data_ptr(),
            address(bias),
            y.data_ptr(),
            rows.shape[0],
            n,
            k,
            wide,
            torch.get_num_threads(),
        )
        return y
    if rows.shape[0] >= MANY_ROWS and not batch_invariant():
        if x.dtype == torch.float32 or native.BF16_ARITHMETIC:
            return linear_twin(x, weight, bias, wide)
        return _widened(rows, weight, bias, wide).view(*x.shape[:-1], n)
    y = empty((*x.shape[:-1], n), torch.float32 if wide else x.dtype)
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


@by_call
def _widened(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wide: bool
) -> torch.Tensor:
    """The products in fp32, a block of weights at a time."""
    n, k = weight.shape
    y = torch.empty(x.shape[0], n, dtype=torch.float32 if wide else x.dtype)
    wide_x = x.float()
    step = max(BLOCK // k, 1)
    for start in range(0, n, step):
        columns = slice(start, start + step)
        wide_bias = None if bias is None else bias[columns].float()
        y[:, columns] = F.linear(wide_x, weight[columns].float(), wide_bias)
    return y
