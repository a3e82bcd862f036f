"""Tiles of queries in the order in which persistent programs take them: a list made on the GPU.

The host knows how many tokens and sequences there are, which bounds the tiles, but no lengths. The
tiles that see the most keys come first, so that no program runs alone at the end. Nothing is
sorted: every tile counts the tiles before it, of each sequence in closed form, because no tile of a
sequence sees more keys than the next.
"""

import torch
import triton
import triton.language as tl

STEP = 1024  # fewer keys make no order: tiles of a sequence stay together and share what they read
BLOCK = 32


@triton.jit(
    do_not_specialize=["count"], do_not_specialize_on_alignment=["offsets_ptr", "lengths_ptr"]
)
def tile_list_kernel(
    list_ptr,  # [1 + tiles, 2]
    offsets_ptr,  # [count + 1]
    lengths_ptr,  # [count]
    count,
    TOKENS: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program s puts the tiles of sequence s in their places; the first also says how many."""
    s = tl.program_id(0)
    if s == 0:
        total = 0
        for start in range(0, count, BLOCK):
            o = start + tl.arange(0, BLOCK)
            others = tl.load(offsets_ptr + o + 1, mask=o < count, other=0)
            others -= tl.load(offsets_ptr + o, mask=o < count, other=0)
            total += tl.sum(tl.cdiv(others, TOKENS), 0)
        tl.store(list_ptr, total)
    queries = tl.load(offsets_ptr + s + 1) - tl.load(offsets_ptr + s)
    length = tl.load(lengths_ptr + s)
    own = tl.cdiv(queries, TOKENS)
    for first in range(0, own, BLOCK):
        tile = first + tl.arange(0, BLOCK)
        end = tl.minimum(length, length - queries + (tile + 1) * TOKENS)
        steps = tl.cdiv(tl.maximum(end, 1), STEP)  # [BLOCK]; to see nothing takes one, too
        place = own - 1 - tile  # its own sequence's later tiles stand before it
        for start in range(0, count, BLOCK):
            o = start + tl.arange(0, BLOCK)
            others = tl.load(offsets_ptr + o + 1, mask=o < count, other=0)
            others -= tl.load(offsets_ptr + o, mask=o < count, other=0)
            keys = tl.load(lengths_ptr + o, mask=o < count, other=0)
            tiles = tl.cdiv(others, TOKENS)
            # Before it stand tiles of more steps, or of as many where the sequence stands before:
            # those that see more than `seen` keys [BLOCK, BLOCK], and at 0 all, as steps are >= 1.
            seen = (steps[:, None] - (o < s).to(tl.int32)[None, :]) * STEP
            fewer = tl.maximum(others[None, :] - keys[None, :] + seen, 0) // TOKENS
            before = tl.where(seen < keys[None, :], tiles[None, :] - fewer, 0)
            before = tl.where(seen == 0, tiles[None, :], before)
            place += tl.sum(tl.where((o == s)[None, :], 0, before), 1)
        tl.store(list_ptr + 2 + 2 * place, s, mask=tile < own)
        tl.store(list_ptr + 3 + 2 * place, tile, mask=tile < own)


def tile_list(
    cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor, tokens: int, queries: int
) -> torch.Tensor:
    """[1 + most, 2] int32: (tiles, -), then for each its (sequence, number within it).

    tokens: queries of a tile. queries: of all sequences, or more; each may end in a tile of fewer.
    """
    count = len(seq_lens)
    shape = (1 + queries // tokens + count, 2)
    listed = torch.empty(shape, dtype=torch.int32, device=seq_lens.device)
    tile_list_kernel[(count,)](
        listed, cu_seqlens_q, seq_lens, count, TOKENS=tokens, STEP=STEP, BLOCK=BLOCK
    )
    return listed
