"""Decode attention on CPU: native where it can be, else as chunks of equal length."""

from typing import Any

import torch

from minisgl.kernels.attention.cpu import attention_cpu
from minisgl.kernels.decode.native import decode_native


def decode_cpu(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    width: int = 1,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `decode_reference`."""
    facts: dict[str, Any] = {
        "page_size": page_size,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "return_lse": return_lse,
        "out": out,
    }
    result = decode_native(q, k_pool, v_pool, page_table, rows, seq_lens, width=width, **facts)
    if result is not None:
        return result
    offsets = torch.arange(seq_lens.shape[0] + 1, dtype=torch.int32) * width
    return attention_cpu(q, k_pool, v_pool, page_table, rows, offsets, seq_lens, **facts)
