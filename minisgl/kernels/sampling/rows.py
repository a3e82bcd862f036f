"""What the kernels of a row share: its parameters, its noise, its values as keys and as masses."""

import triton
import triton.language as tl

from minisgl.kernels.sampling import PARAM_WORDS, PARAMS
from minisgl.kernels.sampling.noise import GOLDEN, MIX32, MIX64


def word_of(name: str) -> tl.constexpr:
    return tl.constexpr(PARAMS.fields[name][1] // 4)  # type: ignore[index]


WORDS = tl.constexpr(PARAM_WORDS)
TEMPERATURE, TOP_P, MIN_P, TOP_K = map(word_of, ("temperature", "top_p", "min_p", "top_k"))
KEY = word_of("key")
_GOLDEN = tl.constexpr(GOLDEN)
_SHIFT1, _FACTOR1 = tl.constexpr(MIX64[0][0]), tl.constexpr(MIX64[0][1])
_SHIFT2, _FACTOR2 = tl.constexpr(MIX64[1][0]), tl.constexpr(MIX64[1][1])
_A, _B = tl.constexpr(MIX32[0]), tl.constexpr(MIX32[1])
# What is known of a row: four floats, of which `aim` writes the bounds; and eight integers.
TOP, CUTOFF, LOW, HIGH = map(tl.constexpr, range(4))
MARKS = tl.constexpr(4)
MASS, GATHERED, FOUND, K, NEEDED, ABOVE, ABOVE_MASS, SEARCHED = map(tl.constexpr, range(8))
SUMS = tl.constexpr(8)


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
def share_of(mass, top_p):
    """What top-p asks of a mass: 1 at least, which the largest value has."""
    share = tl.ceil(top_p.to(tl.float64) * mass.to(tl.float64)).to(tl.int64)
    return tl.maximum(share, 1)


@triton.jit
def eighths(z):
    """floor(8 z), 0 for -inf."""
    return tl.floor(tl.where(z == float("-inf"), 0.0, z) * 8.0)


@triton.jit
def gather(logits, ids, wanted, count, found, values_ptr, ids_ptr, n, CAPACITY: tl.constexpr):
    """Puts the `count` wanted ones behind those that are there, in any order. More than CAPACITY
    are counted only: where 8 z has no fractions left, a cutoff may be rounded down."""
    at = tl.atomic_add(found, count.to(tl.int64)) + tl.cumsum(wanted.to(tl.int32), 0) - 1
    wanted &= at < CAPACITY
    tl.store(values_ptr + n * CAPACITY + at, logits, mask=wanted)
    tl.store(ids_ptr + n * CAPACITY + at, ids, mask=wanted)
