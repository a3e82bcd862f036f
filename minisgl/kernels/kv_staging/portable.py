"""Gather and scatter of whole pages over all layers: one program per run of words, both ways."""

import torch
import triton
import triton.language as tl

from minisgl.kernels.kv_copy.portable import COPY_BLOCK, as_words


@triton.jit(do_not_specialize_on_alignment=["pages_ptr"])
def stage_pages_kernel(
    words_ptr,  # [pools, slots, words per token]
    pages_ptr,  # [N]
    staging_ptr,  # [N, pools, words per page]
    pool_stride,
    POOLS: tl.constexpr,
    PAGE_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    GATHER: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    pool = tl.program_id(1).to(tl.int64)
    page = tl.load(pages_ptr + n).to(tl.int64)
    if page >= 0:
        i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        ok = i < PAGE_WORDS
        kept = words_ptr + pool * pool_stride + page * PAGE_WORDS + i
        staged = staging_ptr + (n * POOLS + pool) * PAGE_WORDS + i
        if GATHER:
            tl.store(staged, tl.load(kept, mask=ok), mask=ok)
        else:
            tl.store(kept, tl.load(staged, mask=ok), mask=ok)


def _launch(
    storage: torch.Tensor, pages: torch.Tensor, staging: torch.Tensor, gather: bool
) -> None:
    layers, two, _, heads, head_dim = storage.shape
    count, page_size = len(pages), staging.shape[3]
    expected = (count, layers, two, page_size, heads, head_dim)
    if staging.shape != expected or staging.dtype != storage.dtype:
        raise ValueError(
            f"staging must be {list(expected)} {storage.dtype}, "
            f"got {list(staging.shape)} {staging.dtype}"
        )
    if not (storage.is_contiguous() and staging.is_contiguous()):
        raise ValueError("storage and staging must be dense")
    if count == 0:
        return
    words = as_words(storage).flatten(0, 1)
    pools, _, token = words.shape
    grid = (count, pools, triton.cdiv(page_size * token, COPY_BLOCK))
    stage_pages_kernel[grid](
        words,
        pages,
        as_words(staging),
        words.stride(0),
        POOLS=pools,
        PAGE_WORDS=page_size * token,
        BLOCK=COPY_BLOCK,
        GATHER=gather,
        num_warps=4,
    )


def gather_pages_portable(
    storage: torch.Tensor, pages: torch.Tensor, staging: torch.Tensor
) -> None:
    """`gather_pages_reference` on a GPU. Raises ValueError for shapes that do not fit."""
    _launch(storage, pages, staging, gather=True)


def scatter_pages_portable(
    storage: torch.Tensor, pages: torch.Tensor, staging: torch.Tensor
) -> None:
    """`scatter_pages_reference` on a GPU. Raises ValueError for shapes that do not fit."""
    _launch(storage, pages, staging, gather=False)
