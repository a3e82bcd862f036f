"""Where a filter ends that goes on below the gathered values: steps 4 to 6 of `portable`.

All programs of a row take part, whose values they read twice.
"""

import triton
import triton.language as tl

from minisgl.kernels.sampling.rows import (
    ABOVE,
    ABOVE_MASS,
    CUTOFF,
    FOUND,
    GATHERED,
    HIGH,
    LOW,
    MARKS,
    MASS,
    MIN_P,
    NEEDED,
    SEARCHED,
    SUMS,
    TEMPERATURE,
    TOP,
    TOP_K,
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

# A weight more than so many bins below the largest is 0 as an integer out of 2^32.
_WEIGHTLESS = tl.constexpr(178)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def aim_kernel(
    rows_ptr,
    params_ptr,
    marks_ptr,
    sums_ptr,
    counts_ptr,
    slices_ptr,  # [N, 2, SLICES] int64: how many values are in each part, and their mass
    V: tl.constexpr,
    BINS: tl.constexpr,
    SLICES: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    n = tl.program_id(0)
    record = params_ptr + tl.load(rows_ptr + n).to(tl.int64) * WORDS
    if is_filtered(record, V):
        top_p = float_word(record, TOP_P)
        marks, sums = marks_ptr + n * MARKS, sums_ptr + n * SUMS
        top, cutoff = tl.load(marks + TOP), tl.load(marks + CUTOFF)
        mass, found = tl.load(sums + MASS), tl.load(sums + FOUND)
        d = tl.arange(0, BINS)
        counts = tl.load(counts_ptr + n * BINS + d)
        near = tl.sum(tl.where(d < BINS - 1, counts, 0), 0)
        # All others lie 31 below the top: they have no mass, and no noise lets them win.
        k = tl.load(record + TOP_K)
        k = tl.where(k <= near, k, 0)
        needed = share_of(mass, top_p)
        enough = (found == near) | ((k > 0) & (found >= k))
        if k == 0:
            enough |= tl.exp(cutoff - top) < float_word(record, MIN_P)
            enough |= (top_p < 1.0) & (tl.load(sums + GATHERED) >= needed)
        tl.store(sums + K, k.to(tl.int64))
        if (enough == 0) | (found == 0) | (found > CAPACITY):
            edge = eighths(top)
            first = tl.sum((tl.cumsum(counts, 0) < k).to(tl.int32), 0)
            last = first
            if k == 0:
                # A bin's mass lies between its count times the weights at its two ends.
                ends = (edge - d) / 8.0 - top
                least = counts * tl.exp(ends)
                most = counts * tl.exp(tl.minimum(ends + 0.125, 0.0))
                whole = mass.to(tl.float32) / 4294967296.0
                wanted, slack = needed.to(tl.float32) / 4294967296.0, whole / 2048.0
                lower, upper = tl.cumsum(least, 0), tl.cumsum(most, 0)
                at_most = tl.minimum(upper, whole - (tl.sum(least, 0) - lower)) + slack
                at_least = tl.maximum(lower, whole - (tl.sum(most, 0) - upper)) - slack
                first = tl.sum((at_most < wanted).to(tl.int32), 0)
                last = tl.sum((at_least < wanted).to(tl.int32), 0)
                first, last = tl.minimum(first, _WEIGHTLESS), tl.minimum(last, _WEIGHTLESS)
            low, high = (edge - last) / 8.0, (edge - first + 1.0) / 8.0
            if (k == 0) & (top_p >= 1.0):  # nothing to search: min-p is tested value by value
                low = tl.full([], float("-inf"), tl.float32)
                high = low
            tl.store(marks + LOW, low)
            tl.store(marks + HIGH, high)
            tl.store(sums + NEEDED, needed)
            tl.store(sums + FOUND, 0)
            tl.store(sums + SEARCHED, 1)
            part = tl.arange(0, 2 * SLICES)
            tl.store(slices_ptr + n * 2 * SLICES + part, tl.zeros([2 * SLICES], tl.int64))


@triton.jit
def slice_of(z, low, high, SLICES: tl.constexpr):
    """The part of [low, high) in which z is, by the same operations wherever it is asked."""
    at = (z - low) * tl.div_rn(SLICES + 0.0, high - low)
    return tl.minimum(tl.maximum(at, 0.0), SLICES - 1.0).to(tl.int32)


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def refine_kernel(
    logits_ptr,
    rows_ptr,
    params_ptr,
    marks_ptr,
    sums_ptr,
    slices_ptr,
    stride,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    SLICES: tl.constexpr,
):
    n = tl.program_id(0)
    record = params_ptr + tl.load(rows_ptr + n).to(tl.int64) * WORDS
    if is_filtered(record, V):
        marks, sums = marks_ptr + n * MARKS, sums_ptr + n * SUMS
        if tl.load(sums + SEARCHED) != 0:
            low, high = tl.load(marks + LOW), tl.load(marks + HIGH)
            if low < high:
                ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
                logits = tl.load(
                    logits_ptr + n.to(tl.int64) * stride + ids, mask=ids < V, other=float("-inf")
                )
                z = scaled(logits, float_word(record, TEMPERATURE))
                mass = fixed_mass(z, tl.load(marks + TOP))
                above = z >= high
                tl.atomic_add(sums + ABOVE, tl.sum(above.to(tl.int64), 0))
                tl.atomic_add(sums + ABOVE_MASS, tl.sum(tl.where(above, mass, 0), 0))
                inside = (z >= low) & (z < high)
                part = slice_of(z, low, high, SLICES)
                at = slices_ptr + n * 2 * SLICES
                first = tl.min(tl.where(inside, part, SLICES), 0)
                if first == tl.max(tl.where(inside, part, -1), 0):  # one address for all to add to
                    tl.atomic_add(at + first, tl.sum(inside.to(tl.int64), 0))
                    tl.atomic_add(at + first + SLICES, tl.sum(tl.where(inside, mass, 0), 0))
                else:
                    tl.atomic_add(at + part, tl.full([BLOCK], 1, tl.int64), mask=inside)
                    tl.atomic_add(at + part + SLICES, mass, mask=inside & (mass > 0))


@triton.jit
def ending(n, marks_ptr, sums_ptr, slices_ptr, both, SLICES: tl.constexpr, CAPACITY: tl.constexpr):
    """Where the filter of a searched row ends: its part of [low, high), SLICES without a search;
    the number and the mass of values above it; how many are to be gathered; and whether that is
    an answer. With `both` filters all values down to that part are gathered, else it alone."""
    low = tl.load(marks_ptr + n * MARKS + LOW)
    high = tl.load(marks_ptr + n * MARKS + HIGH)
    sums = sums_ptr + n * SUMS
    k, needed = tl.load(sums + K), tl.load(sums + NEEDED)
    above, above_mass = tl.load(sums + ABOVE), tl.load(sums + ABOVE_MASS)
    part = tl.zeros([], tl.int32)
    inside = tl.zeros([], tl.int64)
    solved = low == high
    if low < high:
        i = tl.arange(0, SLICES)  # from the highest part down
        at = slices_ptr + n * 2 * SLICES + SLICES - 1 - i
        counts, masses = tl.load(at), tl.load(at + SLICES)
        short = above_mass + tl.cumsum(masses, 0) < needed
        known = above_mass < needed
        if k > 0:
            short = above + tl.cumsum(counts, 0) < k
            known = above < k
        missed = tl.sum(short.to(tl.int32), 0)
        solved = known & (missed < SLICES)
        above += tl.sum(tl.where(short, counts, 0), 0)
        above_mass += tl.sum(tl.where(short, masses, 0), 0)
        inside = tl.sum(tl.where(i == missed, counts, 0), 0)
        part = SLICES - 1 - missed
    if both:
        inside += above
        solved &= inside <= CAPACITY
    return part, above, above_mass, inside, solved


@triton.jit(do_not_specialize_on_alignment=["rows_ptr"])
def regather_kernel(
    logits_ptr,
    rows_ptr,
    positions_ptr,
    params_ptr,
    marks_ptr,
    sums_ptr,
    slices_ptr,
    best_ptr,  # [N, PIECES]: of values that are kept for certain
    best_id_ptr,
    ends_ptr,  # [N, PIECES, 2]: the least and the largest key where the part is not gathered
    values_ptr,
    ids_ptr,
    stride,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    SLICES: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    n = tl.program_id(0)
    piece = tl.program_id(1)
    record = params_ptr + tl.load(rows_ptr + n).to(tl.int64) * WORDS
    if is_filtered(record, V):
        marks, sums = marks_ptr + n * MARKS, sums_ptr + n * SUMS
        if tl.load(sums + SEARCHED) != 0:
            both = (tl.load(sums + K) > 0) & (float_word(record, TOP_P) < 1.0)
            part, _, _, inside, solved = ending(
                n, marks_ptr, sums_ptr, slices_ptr, both, SLICES, CAPACITY
            )
            if solved:
                low, high = tl.load(marks + LOW), tl.load(marks + HIGH)
                ids = piece * BLOCK + tl.arange(0, BLOCK)
                logits = tl.load(
                    logits_ptr + n.to(tl.int64) * stride + ids, mask=ids < V, other=float("-inf")
                )
                z = scaled(logits, float_word(record, TEMPERATURE))
                above = (z >= high) & (ids < V)
                middle = tl.zeros([BLOCK], tl.int1)
                if low < high:
                    between = (z >= low) & (z < high)
                    at = slice_of(z, low, high, SLICES)
                    above |= between & (at > part)
                    middle = between & (at == part)
                if both:
                    middle |= above
                kept = above & (middle == 0)
                if inside > CAPACITY:  # of one value, or they are searched for in the whole row
                    key = ordered_key(z)
                    end = ends_ptr + (n * PIECES + piece) * 2
                    tl.store(end, tl.min(tl.where(middle, key, 2147483647), 0))
                    tl.store(end + 1, tl.max(tl.where(middle, key, -2147483648), 0))
                    kept |= middle
                else:
                    count = tl.sum(middle.to(tl.int32), 0)
                    if count > 0:
                        gather(
                            logits, ids, middle, count, sums + FOUND, values_ptr, ids_ptr, n,
                            CAPACITY,
                        )  # fmt: skip
                noise_low, noise_high = noise_keys(record, tl.load(positions_ptr + n))
                kept &= tl.exp(z - tl.load(marks + TOP)) >= float_word(record, MIN_P)
                noise = gumbel_noise(noise_low, noise_high, ids)
                score = tl.where(kept, z + noise, float("-inf"))
                best, best_at = tl.max(score, 0, return_indices=True)
                best_at = tl.where(best == float("-inf"), V, piece * BLOCK + best_at)
                tl.store(best_ptr + n * PIECES + piece, best)
                tl.store(best_id_ptr + n * PIECES + piece, best_at)
