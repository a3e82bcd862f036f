"""Sampling without sorting the vocabulary: one read of the logits without filters, two with them,
and four where values lie so close together that two are not enough.

1. `scan`: every piece of a row finds its best candidate: the largest logit (greedy), or the largest
   z + noise (no filter). With filters it counts its values by their distance from its maximum.
2. `choose`: a row without filters has its token. One with filters adds up the counts and sets a
   cutoff that at most CAPACITY values reach.
3. `collect`: those values are gathered, and the mass of the whole row is summed (integers, so in
   any order).
4. `aim`: where a filter does not end among the gathered values, the counts, and the mass that they
   can have at least and at most, bound the value where it ends.
5. `refine`: counts and masses between those bounds, in SLICES parts.
6. `regather`: values of the one part where the filter ends are gathered; of those above it, which
   are kept for certain, every piece finds its best z + noise.
7. `draw`: thresholds are found by bisection over the float's bits among the gathered values; the
   best z + noise above them, or of a piece, is the token.

Where more than CAPACITY values, not all equal, lie in one part, or a top-k leaves more than that to
a top-p, one program searches the whole row: right, but slow. Rows of all kinds share the launches,
whose shapes depend on the batch and the vocabulary alone.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.sampling import PARAM_WORDS
from minisgl.kernels.sampling.rows import (
    CUTOFF,
    FOUND,
    GATHERED,
    MARKS,
    MASS,
    MIN_P,
    SEARCHED,
    SUMS,
    TEMPERATURE,
    TOP,
    TOP_P,
    WORDS,
    K,
    eighths,
    fixed_mass,
    float_word,
    gather,
    gumbel_noise,
    is_filtered,
    noise_keys,
    ordered_key,
    scaled,
    share_of,
)
from minisgl.kernels.sampling.search import aim_kernel, ending, refine_kernel, regather_kernel

BLOCK = 4096  # logits per program
BINS = 256  # of width 1/8 in z
CAPACITY = 1024  # values gathered per row
SLICES = 1024  # parts between the bounds of a threshold


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def scan_kernel(
    logits_ptr,  # [N, V]
    rows_ptr,
    positions_ptr,
    params_ptr,
    best_ptr,  # [N, PIECES] fp32
    best_id_ptr,  # [N, PIECES]
    bins_ptr,  # [N, PIECES, BINS]
    stride,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    PIECES: tl.constexpr,
):
    n = tl.program_id(0)
    piece = tl.program_id(1)
    record = params_ptr + tl.load(rows_ptr + n).to(tl.int64) * WORDS
    ids = piece * BLOCK + tl.arange(0, BLOCK)
    ok = ids < V
    logits = tl.load(logits_ptr + n.to(tl.int64) * stride + ids, mask=ok, other=float("-inf"))
    temperature = float_word(record, TEMPERATURE)
    z = scaled(logits, temperature)
    score = z
    filtered = is_filtered(record, V)
    if (temperature != 0.0) & (filtered == 0):
        low, high = noise_keys(record, tl.load(positions_ptr + n))
        score = z + gumbel_noise(low, high, ids)
    best, at = tl.max(score, 0, return_indices=True)
    tl.store(best_ptr + n * PIECES + piece, best)
    tl.store(best_id_ptr + n * PIECES + piece, piece * BLOCK + at)
    if filtered:
        depth = tl.minimum(eighths(best) - tl.floor(z * 8.0), BINS - 1.0)
        counts = tl.histogram(tl.where(ok, depth, BINS - 1.0).to(tl.int32), BINS)
        tl.store(bins_ptr + (n * PIECES + piece) * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def choose_kernel(
    rows_ptr,
    params_ptr,
    best_ptr,
    best_id_ptr,
    bins_ptr,
    tokens_ptr,  # [N]
    marks_ptr,  # [N, MARKS] fp32
    sums_ptr,  # [N, SUMS] int64
    counts_ptr,  # [N, BINS]: bin d holds the z with floor(8 z) = floor(8 top) - d
    V: tl.constexpr,
    BINS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    TOGETHER: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    n = tl.program_id(0)
    record = params_ptr + tl.load(rows_ptr + n).to(tl.int64) * WORDS
    piece = tl.arange(0, BLOCK_PIECES)
    best = tl.load(best_ptr + n * PIECES + piece, mask=piece < PIECES, other=float("-inf"))
    top, at = tl.max(best, 0, return_indices=True)
    tl.store(tokens_ptr + n, tl.load(best_id_ptr + n * PIECES + at))
    if is_filtered(record, V):
        edge = eighths(top)
        depth = tl.arange(0, BINS)
        counts = tl.zeros([BINS], tl.int32)
        for first in range(0, PIECES, TOGETHER):
            c = first + tl.arange(0, TOGETHER)
            its_best = tl.load(best_ptr + n * PIECES + c, mask=c < PIECES, other=float("-inf"))
            lower = tl.minimum(edge - eighths(its_best), BINS + 0.0).to(tl.int32)
            shifted = depth[None, :] - lower[:, None]
            inside = (shifted >= 0) & (shifted < BINS - 1)  # the last bin has no lower end
            inside &= (c < PIECES)[:, None]
            at_bins = bins_ptr + (n * PIECES + c)[:, None] * BINS + shifted
            counts += tl.sum(tl.load(at_bins, mask=inside, other=0), 0)
        fits = (tl.cumsum(counts, 0) <= CAPACITY) & (depth < BINS - 1)
        deep = tl.sum(fits.to(tl.int32), 0)
        tl.store(counts_ptr + n * BINS + depth, counts)
        tl.store(marks_ptr + n * MARKS + TOP, top)
        tl.store(marks_ptr + n * MARKS + CUTOFF, (edge + 1.0 - deep) / 8.0)
        word = tl.arange(0, SUMS)
        tl.store(sums_ptr + n * SUMS + word, tl.zeros([SUMS], tl.int64))


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def collect_kernel(
    logits_ptr,
    rows_ptr,
    params_ptr,
    marks_ptr,
    sums_ptr,
    values_ptr,  # [N, CAPACITY]
    ids_ptr,  # [N, CAPACITY]
    stride,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    n = tl.program_id(0)
    record = params_ptr + tl.load(rows_ptr + n).to(tl.int64) * WORDS
    if is_filtered(record, V):
        ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        logits = tl.load(
            logits_ptr + n.to(tl.int64) * stride + ids, mask=ids < V, other=float("-inf")
        )
        z = scaled(logits, float_word(record, TEMPERATURE))
        sums = sums_ptr + n * SUMS
        mass = fixed_mass(z, tl.load(marks_ptr + n * MARKS + TOP))
        tl.atomic_add(sums + MASS, tl.sum(mass, 0))
        wanted = z >= tl.load(marks_ptr + n * MARKS + CUTOFF)
        count = tl.sum(wanted.to(tl.int32), 0)
        if count > 0:
            tl.atomic_add(sums + GATHERED, tl.sum(tl.where(wanted, mass, 0), 0))
            gather(logits, ids, wanted, count, sums + FOUND, values_ptr, ids_ptr, n, CAPACITY)


@triton.jit
def count_and_mass(source, length, key, temperature, top, SPAN: tl.constexpr):
    """How many of `length` logits have z at least `key`, and their mass."""
    count = tl.zeros([], tl.int32)
    mass = tl.zeros([], tl.int64)
    for start in range(0, length, SPAN):
        i = start + tl.arange(0, SPAN)
        z = scaled(tl.load(source + i, mask=i < length, other=float("-inf")), temperature)
        above = (ordered_key(z) >= key) & (i < length)
        count += tl.sum(above.to(tl.int32), 0)
        mass += tl.sum(tl.where(above, fixed_mass(z, top), 0), 0)
    return count, mass


@triton.jit
def largest_key(source, length, low, high, count, mass, temperature, top, SPAN: tl.constexpr):
    """The largest key that at least `count` values and a mass of `mass` reach.

    `low` is known to be one such key, and none is above `high`.
    """
    while low < high:
        middle = high - (high - low) // 2
        reached, weight = count_and_mass(
            source, length, middle.to(tl.int32), temperature, top, SPAN
        )
        if (reached >= count) & (weight >= mass):
            low = middle
        else:
            high = middle - 1
    return low.to(tl.int32)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def draw_kernel(
    logits_ptr,
    rows_ptr,
    positions_ptr,
    params_ptr,
    marks_ptr,
    sums_ptr,
    slices_ptr,
    best_ptr,
    best_id_ptr,
    ends_ptr,
    values_ptr,
    ids_ptr,
    tokens_ptr,
    stride,
    V: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
    SLICES: tl.constexpr,
    CAPACITY: tl.constexpr,
    SPAN: tl.constexpr,
):
    n = tl.program_id(0)
    record = params_ptr + tl.load(rows_ptr + n).to(tl.int64) * WORDS
    if is_filtered(record, V):
        temperature = float_word(record, TEMPERATURE)
        top_p = float_word(record, TOP_P)
        min_p = float_word(record, MIN_P)
        sums = sums_ptr + n * SUMS
        k = tl.load(sums + K)
        top = tl.load(marks_ptr + n * MARKS + TOP)
        needed = share_of(tl.load(sums + MASS), top_p)
        source = values_ptr + n * CAPACITY
        length = tl.load(sums + FOUND).to(tl.int32)
        gathered_only = tl.full([], 1, tl.int1)
        low = ordered_key(tl.load(marks_ptr + n * MARKS + CUTOFF)).to(tl.int64)
        best = tl.full([], float("-inf"), tl.float32)
        token = tl.full([], V, tl.int32)
        if tl.load(sums + SEARCHED) != 0:
            both = (k > 0) & (top_p < 1.0)
            _, above, above_mass, inside, solved = ending(
                n, marks_ptr, sums_ptr, slices_ptr, both, SLICES, CAPACITY
            )
            piece = tl.arange(0, BLOCK_PIECES)
            there = piece < PIECES
            if solved & (inside > CAPACITY):
                end = ends_ptr + (n * PIECES + piece) * 2
                least = tl.min(tl.load(end, mask=there, other=2147483647), 0)
                solved = least == tl.max(tl.load(end + 1, mask=there, other=-2147483648), 0)
            gathered_only = solved
            low = tl.full([], -2147483648, tl.int64)
            if solved:
                if both == 0:  # the filter goes on below what is kept for certain
                    k = tl.maximum(k - above, 0)
                    needed -= above_mass
                scores = tl.load(best_ptr + n * PIECES + piece, mask=there, other=float("-inf"))
                piece_ids = tl.load(best_id_ptr + n * PIECES + piece, mask=there, other=V)
                best = tl.max(scores, 0)
                token = tl.min(tl.where(scores == best, piece_ids, V), 0)
            else:
                source = logits_ptr + n.to(tl.int64) * stride
                length = V
        high = ordered_key(top).to(tl.int64)
        threshold = low
        if (k > 0) & (length > 0):
            zero = tl.zeros([], tl.int64)
            threshold = largest_key(source, length, low, high, k, zero, temperature, top, SPAN).to(
                tl.int64
            )
            _, total = count_and_mass(
                source, length, threshold.to(tl.int32), temperature, top, SPAN
            )
            needed = share_of(total, top_p)
        if (top_p < 1.0) & (length > 0):
            _, reached = count_and_mass(
                source, length, threshold.to(tl.int32), temperature, top, SPAN
            )
            if reached >= needed:  # else the filter ends below the gathered values
                threshold = largest_key(
                    source, length, threshold, high, 0, needed, temperature, top, SPAN
                ).to(tl.int64)
        noise_low, noise_high = noise_keys(record, tl.load(positions_ptr + n))
        for start in range(0, length, SPAN):
            i = start + tl.arange(0, SPAN)
            inside_span = i < length
            ids = i
            if gathered_only:
                ids = tl.load(ids_ptr + n * CAPACITY + i, mask=inside_span, other=V)
            z = scaled(tl.load(source + i, mask=inside_span, other=float("-inf")), temperature)
            kept = inside_span & (ordered_key(z) >= threshold.to(tl.int32))
            kept &= tl.exp(z - top) >= min_p
            score = tl.where(kept, z + gumbel_noise(noise_low, noise_high, ids), float("-inf"))
            here = tl.max(score, 0)
            first = tl.min(tl.where(kept & (score == here), ids, V), 0)
            better = (here > best) | ((here == best) & (first < token))
            token = tl.where(better, first, token)
            best = tl.where(better, here, best)
        tl.store(tokens_ptr + n, tl.where(token < V, token, 0))


def sample_portable(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    params: torch.Tensor,
    *,
    capacity: int = CAPACITY,
) -> torch.Tensor:
    """`sample_reference` on a GPU. `capacity` changes how much is gathered, never the result."""
    count, vocab = logits.shape
    if logits.dtype != torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"logits must be dense float32, got {logits.dtype} {logits.stride()}")
    if rows.shape != (count,) or positions.shape != (count,):
        raise ValueError(
            f"rows and positions must be [{count}], got "
            f"{list(rows.shape)} and {list(positions.shape)}"
        )
    if params.shape[1:] != (PARAM_WORDS,) or not params.is_contiguous():
        raise ValueError(f"params must be dense [R, {PARAM_WORDS}], got {list(params.shape)}")
    tokens = torch.empty(count, dtype=torch.int32, device=logits.device)
    if count == 0:
        return tokens
    block = min(BLOCK, triton.next_power_of_2(vocab))
    pieces = triton.cdiv(vocab, block)

    def made(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    best, best_id = made(count, pieces, dtype=torch.float32), made(count, pieces)
    bins, counts = made(count, pieces, BINS), made(count, BINS)
    marks = made(count, MARKS.value, dtype=torch.float32)
    sums = made(count, SUMS.value, dtype=torch.int64)
    slices = made(count, 2, SLICES, dtype=torch.int64)
    ends = made(count, pieces, 2)
    values, ids = made(count, capacity, dtype=torch.float32), made(count, capacity)
    stride, padded = logits.stride(0), triton.next_power_of_2(pieces)
    scan_kernel[(count, pieces)](
        logits, rows, positions, params, best, best_id, bins, stride,
        V=vocab, BLOCK=block, BINS=BINS, PIECES=pieces, num_warps=8,
    )  # fmt: skip
    choose_kernel[(count,)](
        rows, params, best, best_id, bins, tokens, marks, sums, counts,
        V=vocab, BINS=BINS, PIECES=pieces, BLOCK_PIECES=padded, TOGETHER=min(16, padded),
        CAPACITY=capacity, num_warps=4,
    )  # fmt: skip
    collect_kernel[(count, pieces)](
        logits, rows, params, marks, sums, values, ids, stride,
        V=vocab, BLOCK=block, CAPACITY=capacity, num_warps=8,
    )  # fmt: skip
    aim_kernel[(count,)](
        rows, params, marks, sums, counts, slices,
        V=vocab, BINS=BINS, SLICES=SLICES, CAPACITY=capacity, num_warps=4,
    )  # fmt: skip
    refine_kernel[(count, pieces)](
        logits, rows, params, marks, sums, slices, stride,
        V=vocab, BLOCK=block, SLICES=SLICES, num_warps=8,
    )  # fmt: skip
    regather_kernel[(count, pieces)](
        logits, rows, positions, params, marks, sums, slices, best, best_id, ends, values, ids,
        stride, V=vocab, BLOCK=block, PIECES=pieces, SLICES=SLICES, CAPACITY=capacity,
        num_warps=16,
    )  # fmt: skip
    draw_kernel[(count,)](
        logits, rows, positions, params, marks, sums, slices, best, best_id, ends, values, ids,
        tokens, stride, V=vocab, PIECES=pieces, BLOCK_PIECES=padded, SLICES=SLICES,
        CAPACITY=capacity, SPAN=1024, num_warps=4,
    )  # fmt: skip
    return tokens
