"""Decode attention on CPU: the chunk attention with an equal number of queries per sequence."""

from typing import Any

import torch

from minisgl.kernels.attention.cpu import attention_cpu


def decode_cpu(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    width: int = 1,
    **facts: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `decode_reference`."""
    offsets = torch.arange(seq_lens.shape[0] + 1, dtype=torch.int32) * width
    return attention_cpu(q, k_pool, v_pool, page_table, rows, offsets, seq_lens, **facts)
