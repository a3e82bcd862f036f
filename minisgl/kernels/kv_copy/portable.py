"""Page copies over all layers in one launch."""

import torch
import triton
import triton.language as tl

COPY_BLOCK = 2048  # words per program


@triton.jit(do_not_specialize_on_alignment=["jobs_ptr"])
def copy_pages_kernel(
    words_ptr,  # [L * 2, slots, words per token]
    jobs_ptr,  # [J, 3]
    pool_stride,
    TOKEN: tl.constexpr,  # words per token
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    job = jobs_ptr + tl.program_id(0) * 3
    source = tl.load(job).to(tl.int64) * (PAGE * TOKEN)
    target = tl.load(job + 1).to(tl.int64) * (PAGE * TOKEN)
    size = tl.load(job + 2) * TOKEN
    pool = words_ptr + tl.program_id(1).to(tl.int64) * pool_stride
    start = tl.program_id(2) * BLOCK
    if start < size:
        i = start + tl.arange(0, BLOCK)
        word = tl.load(pool + source + i, mask=i < size)
        tl.store(pool + target + i, word, mask=i < size)


def as_words(storage: torch.Tensor) -> torch.Tensor:
    """`storage` [..., slots, H, D] seen as [..., slots, words], of the widest integers that fit."""
    flat = storage.flatten(-2)
    row = flat.shape[-1] * flat.element_size()
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8):
        if row % dtype.itemsize == 0 and dtype.itemsize >= flat.element_size():
            return flat.view(dtype)
    return flat


def copy_pages_portable(storage: torch.Tensor, jobs: torch.Tensor, page_size: int) -> None:
    """`copy_pages_reference` on a GPU. Raises ValueError for shapes that do not fit."""
    if storage.dim() != 5 or not storage.is_contiguous():
        raise ValueError(f"storage must be dense [L, 2, slots, H, D], got {list(storage.shape)}")
    if jobs.dim() != 2 or jobs.shape[1] != 3 or not jobs.is_contiguous():
        raise ValueError(f"jobs must be dense [J, 3], got {list(jobs.shape)}")
    if len(jobs) == 0:
        return
    words = as_words(storage).flatten(0, 1)
    pools, _, token = words.shape
    copy_pages_kernel[(len(jobs), pools, triton.cdiv(page_size * token, COPY_BLOCK))](
        words,
        jobs,
        words.stride(0),
        TOKEN=token,
        PAGE=page_size,
        BLOCK=COPY_BLOCK,
        num_warps=4,
    )
