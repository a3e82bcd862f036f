"""Decode attention on CPU: native where it can be, else as chunks of equal length."""

import torch

from minisgl.device.tape import by_call
from minisgl.kernels.attention.cpu import attention_cpu
from minisgl.kernels.attention.paged import Attended, PagedKV
from minisgl.kernels.decode.native import decode_native


def decode_cpu(
    q: torch.Tensor,
    kv: PagedKV,
    *,
    width: int = 1,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> Attended:
    """See `decode_reference`."""
    result = decode_native(q, kv, width=width, return_lse=return_lse, out=out)
    if result is not None:
        return result
    return decode_twin(q, kv, width, return_lse, out)


@by_call
def decode_twin(
    q: torch.Tensor, kv: PagedKV, width: int, return_lse: bool, out: torch.Tensor | None
) -> Attended:
    """The same without the native op."""
    offsets = torch.arange(len(kv.rows) + 1, dtype=torch.int32) * width
    return attention_cpu(q, kv, offsets, return_lse=return_lse, out=out)
