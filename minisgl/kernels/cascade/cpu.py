"""Cascade decode on CPU: native where it can be, else as plain decode, whose result it is."""

from typing import Any

import torch

from minisgl.kernels.attention.paged import Attended, PagedKV
from minisgl.kernels.cascade import check_window
from minisgl.kernels.decode.cpu import decode_cpu
from minisgl.kernels.decode.native import decode_native


def cascade_cpu(
    q: torch.Tensor,
    kv: PagedKV,
    groups: torch.Tensor,
    shared: torch.Tensor,
    *,
    width: int = 1,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> Attended:
    """See `cascade_reference`. The bits are those of `decode`, whatever the groups.

    Raises ValueError for a window.
    """
    check_window(kv)
    facts: dict[str, Any] = {"width": width, "return_lse": return_lse, "out": out}
    result = decode_native(q, kv, groups=groups, shared=shared, **facts)
    return decode_cpu(q, kv, **facts) if result is None else result
