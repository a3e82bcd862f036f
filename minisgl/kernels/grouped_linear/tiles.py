"""Tiles of weights in floats out of a GPU's blocks of codes: where all kernels dequantise."""

import triton
import triton.language as tl


@triton.jit
def widened(codes, HALF: tl.constexpr, BITS: tl.constexpr):
    """1 + code / 16 or 1 + code / 256 in fp32, the codes put into a mantissa."""
    bits = codes.to(tl.int32)
    if BITS == 8:
        bits = bits << 15
    else:  # shifted before it is masked: one instruction less
        bits = (bits << 19 if HALF == 0 else bits << 15) & 0x780000
    return (bits | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def scaled(scales_ptr, minimums_ptr, at, ok, BITS: tl.constexpr, MINIMUMS: tl.constexpr):
    """What turns a `widened` code into a weight: factors, and what is added."""
    scale = tl.load(scales_ptr + at, mask=ok, other=0.0).to(tl.float32)
    factor = scale * (1 << BITS)
    if MINIMUMS:
        return factor, tl.load(minimums_ptr + at, mask=ok, other=0.0).to(tl.float32) - factor
    return factor, -1.5 * factor


@triton.jit
def tile_of_weights(
    codes,  # [BLOCK_N, 32], of the block in which k lies
    scales_ptr,  # [K / GROUP, N]
    minimums_ptr,
    n,  # [BLOCK_N]
    ok,  # which of them are below N
    k,
    N,
    K,
    HALF: tl.constexpr,  # of the block: k is its first input
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    MINIMUMS: tl.constexpr,
    WHOLE: tl.constexpr,  # blocks, none of which goes beyond K
):
    """Weights [BLOCK_N, 32] in fp32: of rows n and of the inputs from k on."""
    group = k // GROUP if WHOLE else tl.minimum(k // GROUP, K // GROUP - 1)
    factor, added = scaled(scales_ptr, minimums_ptr, group * N + n, ok, BITS, MINIMUMS)
    return widened(codes, HALF, BITS) * factor[:, None] + added[:, None]


@triton.jit
def own_blocks(K, BITS: tl.constexpr):
    """From which block of inputs to before which: this program's share along the second axis."""
    blocks = tl.cdiv(K, 256 // BITS)
    run = tl.cdiv(blocks, tl.num_programs(1))
    begin = tl.program_id(1) * run
    return begin, tl.minimum(begin + run, blocks)
