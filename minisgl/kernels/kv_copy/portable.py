"""KV writes by slot, and page copies over all layers in one launch."""

import torch
import triton
import triton.language as tl

COPY_BLOCK = 2048  # words per program


@triton.jit
def write_kv_kernel(
    k_ptr,
    v_ptr,
    k_pool_ptr,  # [slots, H, D]
    v_pool_ptr,
    slots_ptr,  # [T]
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        d = tl.arange(0, BLOCK_D)[None, :]
        ok = (head < H) & (d < D)
        to = slot * H * D + head * D + d
        k = tl.load(k_ptr + token * k_token_stride + head * k_head_stride + d, mask=ok, other=0.0)
        v = tl.load(v_ptr + token * v_token_stride + head * v_head_stride + d, mask=ok, other=0.0)
        tl.store(k_pool_ptr + to, k.to(k_pool_ptr.dtype.element_ty), mask=ok)
        tl.store(v_pool_ptr + to, v.to(v_pool_ptr.dtype.element_ty), mask=ok)


def write_kv_portable(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """`write_kv_reference` on a GPU. Raises ValueError for shapes that do not fit."""
    tokens, heads, head_dim = k.shape
    if v.shape != k.shape:
        raise ValueError(f"v must be {list(k.shape)}, got {list(v.shape)}")
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        if pool.shape[1:] != (heads, head_dim) or not pool.is_contiguous():
            raise ValueError(
                f"{name} must be dense [slots, {heads}, {head_dim}], got {list(pool.shape)}"
            )
    if slot_mapping.shape != (tokens,):
        raise ValueError(f"slot_mapping must be [{tokens}], got {list(slot_mapping.shape)}")
    if k.stride(2) != 1 or v.stride(2) != 1:
        raise ValueError("the last dimension of k and v must be dense")
    if tokens == 0:
        return
    tile = min(8, triton.next_power_of_2(heads))
    write_kv_kernel[(tokens, triton.cdiv(heads, tile))](
        k,
        v,
        k_pool,
        v_pool,
        slot_mapping,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        H=heads,
        D=head_dim,
        HEADS=tile,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=2,
    )


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
