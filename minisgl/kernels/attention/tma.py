"""The portable kernel with keys and values brought by the tensor memory accelerator (sm_90 on).

One thread asks for a whole tile of a page; no address is computed per element and no register
holds what is on its way. A tile lies within one page, so pages must have 16 tokens or more, and
pages of 64 make the tiles of the portable kernel.
"""

import torch

from minisgl.kernels.attention.portable import attention_portable


def attention_tma(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    max_seqlen_q: int | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`attention_reference` on a GPU with TMA. Raises ValueError for pages under 16 tokens."""
    if page_size < 16:
        raise ValueError(f"page_size must be at least 16 for TMA, got {page_size}")
    return attention_portable(
        q,
        k_pool,
        v_pool,
        page_table,
        rows,
        cu_seqlens_q,
        seq_lens,
        page_size=page_size,
        scale=scale,
        window=window,
        softcap=softcap,
        max_seqlen_q=max_seqlen_q,
        return_lse=return_lse,
        out=out,
        tma=True,
    )
