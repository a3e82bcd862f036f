"""Decode attention on CPU: native where it can be, else as chunks of equal length."""

import torch

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
    offsets = torch.arange(len(kv.rows) + 1, dtype=torch.int32) * width
    return attention_cpu(q, kv, offsets, return_lse=return_lse, out=out)
