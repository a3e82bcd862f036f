"""Sampling without sorting the vocabulary: two reads of the logits with filters, one without.

1. `scan`: every piece of a row finds its best candidate: the largest logit (greedy), or the largest
   z + noise (no filter). With filters it counts its values by their distance from its maximum.
2. `choose`: a row without filters has its token. One with filters adds up the counts and sets a
   cutoff that at most CAPACITY values reach.
3. `collect`: those values are gathered, and the mass of the whole row is summed (integers, so in
   any order).
4. `draw`: thresholds are found by bisection over the float's bits among the gathered values, where
   they almost always lie, else over the whole row; the best z + noise above them is the token.

Rows of all kinds share the launches, whose shapes depend on the batch and the vocabulary alone.
"""

import torch
import triton
import triton.language as tl

from minisgl.kernels.sampling import PARAM_WORDS, PARAMS
from minisgl.kernels.sampling.noise import GOLDEN, MIX32, MIX64

BLOCK = 4096  # logits per program
BINS = 256  # of width 1/8 in z
CAPACITY = 1024  # values gathered per row


def word_of(name: str) -> tl.constexpr:
    return tl.constexpr(PARAMS.fields[name][1] // 4)  # type: ignore[index]


WORDS = tl.constexpr(PARAM_WORDS)
TEMPERATURE, TOP_P, MIN_P, TOP_K = map(word_of, ("temperature", "top_p", "min_p", "top_k"))
KEY = word_of("key")
_GOLDEN = tl.constexpr(GOLDEN)
_SHIFT1, _FACTOR1 = tl.constexpr(MIX64[0][0]), tl.constexpr(MIX64[0][1])
_SHIFT2, _FACTOR2 = tl.constexpr(MIX64[1][0]), tl.constexpr(MIX64[1][1])
_A, _B = tl.constexpr(MIX32[0]), tl.constexpr(MIX32[1])


@triton.jit
def float_word(record, word: tl.constexpr):
    return tl.load(record + word).to(tl.float32, bitcast=True)


@triton.jit
def noise_keys(record, position):
    """The two 32-bit keys of one position: the SplitMix64 stream of the row's key."""
    low = tl.load(record + KEY).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(record + KEY + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    x = (low | (high << 32)) + (position + 1).to(tl.uint64) * _GOLDEN
    x = (x ^ (x >> _SHIFT1)) * _FACTOR1
    x = (x ^ (x >> _SHIFT2)) * _FACTOR2
    x = x ^ (x >> 31)
    return x.to(tl.uint32), (x >> 32).to(tl.uint32)


@triton.jit
def hash_bits(low, high, ids):
    """31 random bits as int32, equal to `noise.hash_ids`."""
    x = ids.to(tl.uint32) ^ low
    x = (x ^ (x >> 16)) * _A
    x = ((x ^ (x >> 15)) + high) * _B
    x = x ^ (x >> 16)
    return (x & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def gumbel_noise(low, high, ids):
    """Standard Gumbel noise, to rounding `noise.gumbel`: log1p(-v) is log(u) v / (1 - u)."""
    v = (hash_bits(low, high, ids).to(tl.float32) + 0.5) * (2.0**-31 - 2.0**-55)
    u = 1.0 - v
    exact = u == 1.0
    e = tl.where(exact, v, -tl.log(u) * v / tl.where(exact, 1.0, 1.0 - u))
    return -tl.log(e)


@triton.jit
def is_filtered(record, V: tl.constexpr):
    k = tl.load(record + TOP_K)
    limits = ((k > 0) & (k < V)) | (float_word(record, TOP_P) < 1.0)
    limits |= float_word(record, MIN_P) > 0.0
    return limits & (float_word(record, TEMPERATURE) != 0.0)


@triton.jit
def scaled(logits, temperature):
    return tl.div_rn(logits, tl.where(temperature == 0.0, 1.0, temperature)) + 0.0  # no -0


@triton.jit
def ordered_key(z):
    """int32 in the order of float32."""
    bits = z.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def fixed_mass(z, top):
    return (tl.exp(z - top).to(tl.float64) * 4294967296.0).to(tl.int64)


@triton.jit
def eighths(z):
    """floor(8 z), 0 for -inf."""
    return tl.floor(tl.where(z == float("-inf"), 0.0, z) * 8.0)


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


@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "cutoff_ptr"])
def choose_kernel(
    rows_ptr,
    params_ptr,
    best_ptr,
    best_id_ptr,
    bins_ptr,
    tokens_ptr,  # [N]
    top_ptr,  # [N]: the largest z
    cutoff_ptr,  # [N]
    found_ptr,  # [N]: values gathered so far
    mass_ptr,  # [N]
    V: tl.constexpr,
    BINS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_PIECES: tl.constexpr,
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
        for c in range(PIECES):
            lower = edge - eighths(tl.load(best_ptr + n * PIECES + c))
            shifted = depth - tl.minimum(lower, BINS + 0.0).to(tl.int32)
            inside = (shifted >= 0) & (shifted < BINS - 1)  # the last bin has no lower end
            counts += tl.load(bins_ptr + (n * PIECES + c) * BINS + shifted, mask=inside, other=0)
        fits = (tl.cumsum(counts, 0) <= CAPACITY) & (depth < BINS - 1)
        deep = tl.sum(fits.to(tl.int32), 0)  # bin d holds the z with floor(8 z) = edge - d
        tl.store(cutoff_ptr + n, (edge + 1.0 - deep) / 8.0)
        tl.store(top_ptr + n, top)
        tl.store(found_ptr + n, 0)
        tl.store(mass_ptr + n, tl.zeros([], tl.int64))


@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "cutoff_ptr"])
def collect_kernel(
    logits_ptr,
    rows_ptr,
    params_ptr,
    top_ptr,
    cutoff_ptr,
    found_ptr,
    mass_ptr,
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
        tl.atomic_add(mass_ptr + n, tl.sum(fixed_mass(z, tl.load(top_ptr + n)), 0))
        wanted = z >= tl.load(cutoff_ptr + n)
        count = tl.sum(wanted.to(tl.int32), 0)
        if count > 0:
            at = tl.atomic_add(found_ptr + n, count) + tl.cumsum(wanted.to(tl.int32), 0) - 1
            tl.store(values_ptr + n * CAPACITY + at, logits, mask=wanted)
            tl.store(ids_ptr + n * CAPACITY + at, ids, mask=wanted)


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


@triton.jit(do_not_specialize_on_alignment=["rows_ptr", "cutoff_ptr"])
def draw_kernel(
    logits_ptr,
    rows_ptr,
    positions_ptr,
    params_ptr,
    top_ptr,
    cutoff_ptr,
    found_ptr,
    mass_ptr,
    values_ptr,
    ids_ptr,
    tokens_ptr,
    stride,
    V: tl.constexpr,
    CAPACITY: tl.constexpr,
    SPAN: tl.constexpr,
):
    n = tl.program_id(0)
    record = params_ptr + tl.load(rows_ptr + n).to(tl.int64) * WORDS
    if is_filtered(record, V):
        temperature = float_word(record, TEMPERATURE)
        top_p = float_word(record, TOP_P)
        min_p = float_word(record, MIN_P)
        k = tl.load(record + TOP_K)
        k = tl.where(k < V, k, 0)
        top = tl.load(top_ptr + n)
        found = tl.load(found_ptr + n)
        total = tl.load(mass_ptr + n)
        cutoff = tl.load(cutoff_ptr + n)
        low = ordered_key(cutoff).to(tl.int64)
        high = ordered_key(top).to(tl.int64)
        source = values_ptr + n * CAPACITY
        length = found
        # Whether one of the filters ends within the gathered values, so that they are enough.
        enough = (k > 0) & (found >= k)
        if (k == 0) & (found > 0):
            enough = tl.exp(cutoff - top) < min_p
            if top_p < 1.0:
                _, gathered = count_and_mass(source, found, -2147483648, temperature, top, SPAN)
                enough |= gathered >= tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(
                    tl.int64
                )
        gathered_only = enough
        if gathered_only == 0:
            source = logits_ptr + n.to(tl.int64) * stride
            length = V
            low = tl.full([], -2147483648, tl.int64)
        threshold = low
        if k > 0:
            zero = tl.zeros([], tl.int64)
            threshold = largest_key(source, length, low, high, k, zero, temperature, top, SPAN).to(
                tl.int64
            )
            _, total = count_and_mass(
                source, length, threshold.to(tl.int32), temperature, top, SPAN
            )
        if top_p < 1.0:
            needed = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
            _, reached = count_and_mass(
                source, length, threshold.to(tl.int32), temperature, top, SPAN
            )
            if reached >= needed:  # else the filter ends below the gathered values
                threshold = largest_key(
                    source, length, threshold, high, 0, needed, temperature, top, SPAN
                ).to(tl.int64)
        noise_low, noise_high = noise_keys(record, tl.load(positions_ptr + n))
        best = tl.full([], float("-inf"), tl.float32)
        token = tl.full([], V, tl.int32)
        for start in range(0, length, SPAN):
            i = start + tl.arange(0, SPAN)
            inside = i < length
            ids = i
            if gathered_only:
                ids = tl.load(ids_ptr + n * CAPACITY + i, mask=inside, other=V)
            z = scaled(tl.load(source + i, mask=inside, other=float("-inf")), temperature)
            kept = inside & (ordered_key(z) >= threshold.to(tl.int32))
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
    bins = made(count, pieces, BINS)
    top, cutoff = made(2, count, dtype=torch.float32)
    found, mass = made(count), made(count, dtype=torch.int64)
    values, ids = made(count, capacity, dtype=torch.float32), made(count, capacity)
    stride = logits.stride(0)
    scan_kernel[(count, pieces)](
        logits, rows, positions, params, best, best_id, bins, stride,
        V=vocab, BLOCK=block, BINS=BINS, PIECES=pieces, num_warps=8,
    )  # fmt: skip
    choose_kernel[(count,)](
        rows, params, best, best_id, bins, tokens, top, cutoff, found, mass,
        V=vocab, BINS=BINS, PIECES=pieces, BLOCK_PIECES=triton.next_power_of_2(pieces),
        CAPACITY=capacity, num_warps=4,
    )  # fmt: skip
    collect_kernel[(count, pieces)](
        logits, rows, params, top, cutoff, found, mass, values, ids, stride,
        V=vocab, BLOCK=block, CAPACITY=capacity, num_warps=8,
    )  # fmt: skip
    draw_kernel[(count,)](
        logits, rows, positions, params, top, cutoff, found, mass, values, ids, tokens, stride,
        V=vocab, CAPACITY=capacity, SPAN=1024, num_warps=4,
    )  # fmt: skip
    return tokens
