"""Products with weights of 4 and 8 bits on a GPU: codes become floats in registers.

One and two rows are multiplied without tensor cores (`few_rows_kernel`), whose operands would have
to change places between threads first. For more a tile of weights is the left operand of tensor
cores (`tiles_kernel`), which may lie in registers, so that weights never stand in shared memory as
floats; they are rounded to the type of x there, in the other kernel not at all.

Where a product has fewer tiles than keep a GPU busy, programs share out the inputs and leave parts,
which `sum_parts_kernel` adds up in their order: results repeat. Under `config.fixed_order` one tile
serves every number of rows and nothing is shared out.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.config import architecture, batch_invariant, product_tile
from minisgl.kernels.grouped_linear.blocks import GroupedBlocks, packed
from minisgl.kernels.grouped_linear.tiles import own_blocks, tile_of_weights
from minisgl.kernels.grouped_linear.weights import Grouped

FEW_ROWS = 2
MANY_ROWS = 64  # more have tiles of their own
FEW_COLUMNS = 64  # outputs of a program; more, and scales change places between threads
MAX_PARTS = 16
LEAST_BLOCKS = 4  # of a part
PROGRAMS = 8  # to a processor, where they share out inputs
SUM_BLOCK = 1024


@triton.jit
def few_rows_kernel(
    x_ptr,  # [ROWS, K]
    codes_ptr,  # [blocks, N, 32]
    scales_ptr,  # [K / GROUP, N]
    minimums_ptr,
    bias_ptr,  # [N]
    out_ptr,  # [parts, ROWS, N]
    x_stride,
    N,
    K,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    MINIMUMS: tl.constexpr,
    WHOLE: tl.constexpr,  # blocks, none of which goes beyond K
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    INPUTS: tl.constexpr = 256 // BITS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = n < N
    j = tl.arange(0, 32)
    begin, end = own_blocks(K, BITS)
    codes_at = codes_ptr + begin.to(tl.int64) * (N * 32) + n[:, None] * 32 + j[None, :]
    first = tl.zeros([BLOCK_N, 32], tl.float32)
    second = first
    for block in range(begin, end):
        codes = tl.load(codes_at, mask=ok[:, None], other=0)
        codes_at += N * 32
        for half in tl.static_range(8 // BITS):
            k = block * INPUTS + half * 32
            weights = tile_of_weights(
                codes, scales_ptr, minimums_ptr, n, ok, k, N, K, half, GROUP, BITS, MINIMUMS, WHOLE
            )
            x = tl.load(x_ptr + k + j, mask=WHOLE | (k + j < K), other=0.0)
            first += x.to(tl.float32)[None, :] * weights
            if ROWS == 2:
                x = tl.load(x_ptr + x_stride + k + j, mask=WHOLE | (k + j < K), other=0.0)
                second += x.to(tl.float32)[None, :] * weights
    bias = tl.zeros([BLOCK_N], tl.float32)
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=ok, other=0.0).to(tl.float32)
    to = out_ptr + (tl.program_id(1) * ROWS).to(tl.int64) * N + n
    tl.store(to, (tl.sum(first, 1) + bias).to(out_ptr.dtype.element_ty), mask=ok)
    if ROWS == 2:
        tl.store(to + N, (tl.sum(second, 1) + bias).to(out_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["M"])
def tiles_kernel(
    x_ptr,  # [M, K]
    codes_ptr,  # [blocks, N, 32]
    scales_ptr,  # [K / GROUP, N]
    minimums_ptr,
    bias_ptr,  # [N]
    out_ptr,  # [parts, M, N]
    M,
    x_stride,
    N,
    K,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    MINIMUMS: tl.constexpr,
    WHOLE: tl.constexpr,  # blocks, none of which goes beyond K
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    INPUTS: tl.constexpr = 256 // BITS
    row_blocks = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = n < N
    j = tl.arange(0, 32)
    begin, end = own_blocks(K, BITS)
    codes_at = codes_ptr + begin.to(tl.int64) * (N * 32) + n[:, None] * 32 + j[None, :]
    x_at = x_ptr + m.to(tl.int64)[:, None] * x_stride + j[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in range(begin, end):
        codes = tl.load(codes_at, mask=ok[:, None], other=0)
        codes_at += N * 32
        for half in tl.static_range(8 // BITS):
            k = block * INPUTS + half * 32
            weights = tile_of_weights(
                codes, scales_ptr, minimums_ptr, n, ok, k, N, K, half, GROUP, BITS, MINIMUMS, WHOLE
            )
            inside = (m < M)[:, None]
            if not WHOLE:
                inside = inside & (k + j < K)[None, :]
            x = tl.load(x_at + k, mask=inside, other=0.0)
            acc = tl.dot(weights.to(x.dtype), tl.trans(x), acc, input_precision="ieee")
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=ok, other=0.0).to(tl.float32)[:, None]
    to = (tl.program_id(1) * M + m).to(tl.int64)[None, :] * N + n[:, None]
    mask = (m < M)[None, :] & ok[:, None]
    tl.store(out_ptr + to, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["parts", "size"])
def sum_parts_kernel(
    parts_ptr,  # [parts, M, N]
    bias_ptr,  # [N]
    out_ptr,  # [M, N]
    parts,
    size,  # M * N
    N,
    BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        acc += tl.load(parts_ptr + part * size + at, mask=at < size, other=0.0)
    if BIAS:
        acc += tl.load(bias_ptr + at % N, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=at < size)


def part_count(tiles: int, processors: int, blocks: int, rows: int) -> int:
    """Programs that share out the inputs of a tile: a power of two, by shapes alone.

    With many rows the parts themselves would be more than what is gained by reading at once.
    """
    useful = min(blocks // LEAST_BLOCKS, 4 * blocks // rows, MAX_PARTS)
    wanted = max(1, min(PROGRAMS * processors // tiles, useful))
    return 1 << (wanted.bit_length() - 1)


def grouped_linear_portable(
    x: torch.Tensor,
    weight: Grouped | GroupedBlocks,
    bias: torch.Tensor | None = None,
    wide: bool = False,
) -> torch.Tensor:
    """`grouped_linear_reference` on a GPU. Raises ValueError for shapes that do not fit."""
    blocks = packed(weight) if isinstance(weight, Grouped) else weight
    outputs, inputs = blocks.shape
    if x.shape[-1] != inputs or (bias is not None and bias.shape != (outputs,)):
        raise ValueError(
            f"x must be [..., {inputs}] and bias [{outputs}], got {list(x.shape)} and "
            f"{None if bias is None else list(bias.shape)}"
        )
    rows = x.reshape(-1, inputs)
    if rows.stride(1) != 1:
        raise ValueError("x must be dense in its last dimension")
    dtype, (count, _) = torch.float32 if wide else x.dtype, rows.shape
    out = torch.empty((*x.shape[:-1], outputs), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    arch, fixed = architecture(x.device), batch_invariant()
    many = fixed or count > MANY_ROWS
    tile = product_tile(arch.grouped if many else arch.grouped_few, x.dtype)
    few = count <= FEW_ROWS and not fixed
    columns = triton.cdiv(outputs, FEW_COLUMNS if few else tile.cols)
    block_m = tile.rows if many or count <= tile.rows else MANY_ROWS
    tiles = columns * (1 if few else triton.cdiv(count, block_m))
    parts = 1 if fixed else part_count(tiles, arch.processors, len(blocks.codes), count)
    target, has_bias = out, bias is not None and parts == 1
    if parts > 1:
        target = torch.empty((parts, count, outputs), dtype=torch.float32, device=x.device)
    given = bias if has_bias else blocks.scales
    tensors, sizes = (rows, *blocks.pointers, given, target), (rows.stride(0), *blocks.shape)
    if few:
        few_rows_kernel[(columns, parts)](
            *tensors,
            *sizes,
            **blocks.constants,
            BIAS=has_bias,
            ROWS=count,
            BLOCK_N=FEW_COLUMNS,
            num_warps=4,
        )
    else:
        tiles_kernel[(tiles, parts)](
            *tensors,
            count,
            *sizes,
            **blocks.constants,
            BIAS=has_bias,
            BLOCK_M=block_m,
            BLOCK_N=tile.cols,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    if parts > 1:
        size = out.numel()
        sum_parts_kernel[(triton.cdiv(size, SUM_BLOCK),)](
            target,
            target if bias is None else bias,
            out,
            parts,
            size,
            outputs,
            BIAS=bias is not None,
            BLOCK=SUM_BLOCK,
            num_warps=4,
        )
    return out
