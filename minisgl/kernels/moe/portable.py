"""Experts as two grouped products over tokens sorted by expert.

`count` gives every (token, choice) pair its rank within its expert; `align` turns ranks into
positions, each expert's rows padded to whole tiles; the two products go over the tiles, the first
with the activation in its epilogue; `combine` adds a token's choices in their order. Ranks come
from atomics, but a row's product does not depend on its place in a tile, so results repeat.
Weights in codes become floats in registers, as in `grouped_linear`, and are the left operand.
Launch shapes depend on the number of tokens only: tiles that no expert needs return at once.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from minisgl.kernels.config import Tile, architecture, batch_invariant, product_tile
from minisgl.kernels.grouped_linear.blocks import GroupedBlocks, packed
from minisgl.kernels.grouped_linear.tiles import tile_of_weights
from minisgl.kernels.grouped_linear.weights import Grouped

ROUTE_ROWS = 8
ALIGN_BLOCK = 32


@triton.jit(do_not_specialize=["tokens"])
def route_kernel(
    logits_ptr,  # [T, E]
    weights_ptr,  # [T, K]
    ids_ptr,  # [T, K]
    tokens,
    stride,
    E: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_E)[None, :]
    k = tl.arange(0, BLOCK_K)[None, :]
    row_ok = (row < tokens)[:, None]
    at = row.to(tl.int64)[:, None] * stride + e
    x = tl.load(logits_ptr + at, mask=row_ok & (e < E), other=float("-inf")).to(tl.float32)
    x = tl.where(row_ok, x, 0.0)
    p = tl.exp(x - tl.max(x, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    p = tl.where(e < E, p, -1.0)
    weights = tl.zeros([ROWS, BLOCK_K], tl.float32)
    ids = tl.zeros([ROWS, BLOCK_K], tl.int32)
    for choice in tl.static_range(K):
        best, index = tl.max(p, 1, return_indices=True)
        weights = tl.where(k == choice, best[:, None], weights)
        ids = tl.where(k == choice, index[:, None], ids)
        p = tl.where(e == index[:, None], -1.0, p)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, 1)[:, None]
    to = row[:, None] * K + k
    tl.store(weights_ptr + to, weights, mask=row_ok & (k < K))
    tl.store(ids_ptr + to, ids, mask=row_ok & (k < K))


@triton.jit(do_not_specialize=["pairs"])
def count_kernel(ids_ptr, counts_ptr, ranks_ptr, pairs, E: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(ids_ptr + i, mask=i < pairs, other=-1)
    mine = (expert >= 0) & (expert < E)
    rank = tl.atomic_add(counts_ptr + expert, 1, mask=mine)
    tl.store(ranks_ptr + i, rank, mask=mine)


@triton.jit(do_not_specialize=["pairs", "tiles"])
def align_kernel(
    ids_ptr,
    counts_ptr,  # [E]
    ranks_ptr,
    sorted_ptr,  # [tiles * BLOCK_M], -1 where no pair will stand
    tile_expert_ptr,  # [tiles]
    pairs,
    tiles,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    e = tl.arange(0, BLOCK_E)
    needed = tl.cdiv(tl.load(counts_ptr + e, mask=e < E, other=0), BLOCK_M)
    end = tl.cumsum(needed, 0)
    expert = tl.load(ids_ptr + i, mask=i < pairs, other=-1)
    mine = (expert >= 0) & (expert < E)
    before = tl.sum(tl.where(e[None, :] < expert[:, None], needed[None, :], 0), 1)
    rank = tl.load(ranks_ptr + i, mask=mine, other=0)
    tl.store(sorted_ptr + before * BLOCK_M + rank, i, mask=mine)
    owner = tl.sum((end[None, :] <= i[:, None]).to(tl.int32), 1)  # experts done before tile i
    tl.store(tile_expert_ptr + i, owner, mask=i < tiles)


@triton.jit
def activated(gate, GELU: tl.constexpr):
    argument = gate
    if GELU:
        argument = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    return gate / (1.0 + tl.exp(-argument))


@triton.jit
def experts_kernel(
    a_ptr,  # [T, K] gated, else [pairs, K]
    weight_ptr,  # [E, 2 N, K] gated, else [E, N, K]
    out_ptr,  # [pairs, N]
    sorted_ptr,
    tile_expert_ptr,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
):
    tile = tl.program_id(0)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < E:
        pair = tl.load(sorted_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        row_ok = (pair >= 0)[:, None]
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        n_ok = (n < N)[:, None]
        k = tl.arange(0, BLOCK_K)
        row = tl.where(pair >= 0, pair // TOP_K if GATED else pair, 0)
        a_at = a_ptr + row[:, None] * K + k[None, :]
        rows: tl.constexpr = 2 * N if GATED else N
        weight = weight_ptr + expert.to(tl.int64) * (rows * K) + n[:, None] * K + k[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, K, BLOCK_K):
            inside = (k + start < K)[None, :]
            a = tl.load(a_at + start, mask=row_ok & inside, other=0.0)
            w = tl.load(weight + start, mask=n_ok & inside, other=0.0)
            acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")
            if GATED:
                w = tl.load(weight + N * K + start, mask=n_ok & inside, other=0.0)
                up = tl.dot(a, tl.trans(w), up, input_precision="ieee")
        if GATED:
            acc = activated(acc, GELU) * up
        to = out_ptr + tl.where(pair >= 0, pair, 0)[:, None] * N + n[None, :]
        tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=row_ok & (n < N)[None, :])


@triton.jit
def coded_experts_kernel(
    a_ptr,  # [T, K] gated, else [pairs, K]
    codes_ptr,  # [E, blocks, 2 N, 32] gated, else [E, blocks, N, 32]
    scales_ptr,  # [E, K / GROUP, 2 N] gated, else [E, K / GROUP, N]
    minimums_ptr,
    out_ptr,  # [pairs, N]
    sorted_ptr,
    tile_expert_ptr,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    MINIMUMS: tl.constexpr,
    WHOLE: tl.constexpr,  # blocks, none of which goes beyond K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GATED: tl.constexpr,
    GELU: tl.constexpr,
):
    tile = tl.program_id(0)
    expert = tl.load(tile_expert_ptr + tile)
    if expert < E:
        INPUTS: tl.constexpr = 256 // BITS
        blocks: tl.constexpr = (K + INPUTS - 1) // INPUTS
        rows: tl.constexpr = 2 * N if GATED else N
        pair = tl.load(sorted_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        row = tl.where(pair >= 0, pair // TOP_K if GATED else pair, 0)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        ok = n < N
        j = tl.arange(0, 32)
        a_at = a_ptr + row[:, None] * K + j[None, :]
        codes_at = codes_ptr + expert.to(tl.int64) * (blocks * rows * 32)
        codes_at += n[:, None] * 32 + j[None, :]
        scales_at = scales_ptr + expert.to(tl.int64) * (K // GROUP * rows)
        minimums_at = minimums_ptr + expert.to(tl.int64) * (K // GROUP * rows)
        acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for block in range(blocks):
            codes = tl.load(codes_at, mask=ok[:, None], other=0)
            if GATED:
                ups = tl.load(codes_at + N * 32, mask=ok[:, None], other=0)
            codes_at += rows * 32
            for half in tl.static_range(8 // BITS):
                k = block * INPUTS + half * 32
                inside = (pair >= 0)[:, None]
                if not WHOLE:
                    inside = inside & (k + j < K)[None, :]
                a = tl.trans(tl.load(a_at + k, mask=inside, other=0.0))
                w = tile_of_weights(
                    codes, scales_at, minimums_at, n, ok, k, rows, K, half,
                    GROUP, BITS, MINIMUMS, WHOLE,
                )  # fmt: skip
                acc = tl.dot(w.to(a.dtype), a, acc, input_precision="ieee")
                if GATED:
                    w = tile_of_weights(
                        ups, scales_at, minimums_at, n + N, ok, k, rows, K, half,
                        GROUP, BITS, MINIMUMS, WHOLE,
                    )  # fmt: skip
                    up = tl.dot(w.to(a.dtype), a, up, input_precision="ieee")
        if GATED:
            acc = activated(acc, GELU) * up
        to = out_ptr + tl.where(pair >= 0, pair, 0)[None, :] * N + n[:, None]
        tl.store(to, acc.to(out_ptr.dtype.element_ty), mask=(pair >= 0)[None, :] & ok[:, None])


@triton.jit
def combine_kernel(
    parts_ptr,  # [T * TOP_K, H]
    weights_ptr,  # [T, TOP_K]
    ids_ptr,
    out_ptr,  # [T, H]
    E: tl.constexpr,
    H: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for choice in range(TOP_K):
        pair = token * TOP_K + choice
        expert = tl.load(ids_ptr + pair)
        ok = (h < H) & (expert >= 0) & (expert < E)
        part = tl.load(parts_ptr + pair * H + h, mask=ok, other=0.0).to(tl.float32)
        acc += part * tl.load(weights_ptr + pair)
    tl.store(out_ptr + token * H + h, acc.to(out_ptr.dtype.element_ty), mask=h < H)


def moe_route_portable(
    logits: torch.Tensor, top_k: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`moe_route_reference` on a GPU."""
    tokens, experts = logits.shape
    if not 1 <= top_k <= experts or logits.stride(1) != 1:
        raise ValueError(f"top_k must be from 1 to {experts} over dense logits, got {top_k}")
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=logits.device)
    if tokens:
        route_kernel[(triton.cdiv(tokens, ROUTE_ROWS),)](
            logits,
            weights,
            ids,
            tokens,
            logits.stride(0),
            E=experts,
            K=top_k,
            ROWS=ROUTE_ROWS,
            BLOCK_E=triton.next_power_of_2(experts),
            BLOCK_K=triton.next_power_of_2(top_k),
            RENORMALIZE=renormalize,
            num_warps=4,
        )
    return weights, ids


def launch_sort(
    ids: torch.Tensor, experts: int, tile_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(pairs by expert, each expert's padded to whole tiles by -1; the expert of each tile)."""
    pairs = ids.numel()
    tiles = pairs // tile_rows + min(experts, pairs)

    def made(size: int, fill: int) -> torch.Tensor:
        return torch.full((size,), fill, dtype=torch.int32, device=ids.device)

    counts, ranks = made(experts, 0), torch.empty(pairs, dtype=torch.int32, device=ids.device)
    order = made(tiles * tile_rows, -1)
    tile_expert = torch.empty(tiles, dtype=torch.int32, device=ids.device)
    count_kernel[(triton.cdiv(pairs, ALIGN_BLOCK),)](
        ids, counts, ranks, pairs, E=experts, BLOCK=ALIGN_BLOCK, num_warps=4
    )
    align_kernel[(triton.cdiv(max(pairs, tiles), ALIGN_BLOCK),)](
        ids,
        counts,
        ranks,
        order,
        tile_expert,
        pairs,
        tiles,
        E=experts,
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_M=tile_rows,
        BLOCK=ALIGN_BLOCK,
        num_warps=4,
    )
    return order, tile_expert


def moe_experts_portable(
    x: torch.Tensor,
    gate_up: torch.Tensor | Grouped | GroupedBlocks,
    down: torch.Tensor | Grouped | GroupedBlocks,
    weights: torch.Tensor,
    ids: torch.Tensor,
    activation: str = "silu",
) -> torch.Tensor:
    """`moe_experts_reference` on a GPU. Raises ValueError for shapes that do not fit."""
    tokens, hidden = x.shape
    experts, _, inner = down.shape
    top_k = ids.shape[1]
    if gate_up.shape != (experts, 2 * inner, hidden) or down.shape[1] != hidden:
        raise ValueError(
            f"gate_up must be {[experts, 2 * inner, hidden]} and down {[experts, hidden, inner]}, "
            f"got {list(gate_up.shape)} and {list(down.shape)}"
        )
    if activation not in ("silu", "gelu_tanh"):
        raise ValueError(f"activation must be silu or gelu_tanh, got {activation!r}")
    matrices = [packed(each) if isinstance(each, Grouped) else each for each in (gate_up, down)]
    dense = (x, weights, ids, *(each for each in matrices if torch.is_tensor(each)))
    if not all(tensor.is_contiguous() for tensor in dense):
        raise ValueError("x, gate_up, down, weights and ids must be dense")
    out = torch.empty_like(x)
    pairs = tokens * top_k
    if pairs == 0:
        return out
    arch = architecture(x.device)
    few = pairs <= 16 * experts and not batch_invariant()
    tile: Tile = product_tile(arch.experts_few if few else arch.experts, x.dtype)
    in_codes: Tile = product_tile(arch.grouped_few if few else arch.grouped, x.dtype)
    order, tile_expert = launch_sort(ids, experts, tile.rows)
    middle = torch.empty((pairs, inner), dtype=x.dtype, device=x.device)
    parts = torch.empty((pairs, hidden), dtype=x.dtype, device=x.device)
    how: dict[str, Any] = {"TOP_K": top_k, "GELU": activation == "gelu_tanh"}
    for source, weight, target in ((x, matrices[0], middle), (middle, matrices[1], parts)):
        how["GATED"], coded = target is middle, isinstance(weight, GroupedBlocks)
        # Half of them where there are two accumulators, or floats are made of codes in registers.
        columns = tile.cols // 2 if how["GATED"] or coded else tile.cols
        sizes = {"E": experts, "N": target.shape[1], "K": source.shape[1]}
        sizes |= {"BLOCK_M": tile.rows, "BLOCK_N": columns}
        launched = in_codes if coded else tile
        launch = {"num_warps": launched.warps, "num_stages": launched.stages}
        grid, sort = (len(tile_expert), triton.cdiv(target.shape[1], columns)), (order, tile_expert)
        if coded:
            facts = sizes | weight.constants | how | launch
            coded_experts_kernel[grid](source, *weight.pointers, target, *sort, **facts)
        else:
            facts = sizes | {"BLOCK_K": tile.depth} | how | launch
            experts_kernel[grid](source, weight, target, *sort, **facts)
    combine_kernel[(tokens, triton.cdiv(hidden, 1024))](
        parts, weights, ids, out, E=experts, H=hidden, TOP_K=top_k, BLOCK=1024, num_warps=4
    )
    return out
