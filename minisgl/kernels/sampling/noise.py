"""Counter-based noise: a pure function of (seed, choice, position, purpose, vocabulary id).

Nothing is drawn in sequence, so a request samples the same tokens alone, in any batch, after a
preemption, or when drafts are verified. A row's 64-bit key comes from its seed and choice; the key
of one position is the SplitMix64 stream at that position (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", 2014); its two halves key a 32-bit finaliser over the vocabulary
ids (constants from Wellons' hash prospector, "lowbias32").
"""

import torch

MASK64 = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
MIX64 = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # (shift, factor), then 31
MIX32 = (0x7FEB352D, 0x846CA68B)
TARGET = 0  # purpose: the target model's own sample, drafts included


def row_key(seed: int, choice: int, purpose: int = TARGET) -> int:
    """The key of one choice of a request, as a signed 64-bit integer."""
    key = _mix64_int(_mix64_int((seed + GOLDEN) & MASK64) + (choice << 8 | purpose) * GOLDEN)
    return key - 2**64 if key >= 2**63 else key


def position_keys(keys: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two int32 keys [N] each, for row keys [N] int64 and positions [N] of the tokens drawn."""
    x = keys + (positions.long() + 1) * _signed(GOLDEN, 64)
    for shift, factor in MIX64:
        x = (x ^ _shift(x, shift, 64)) * _signed(factor, 64)
    x = x ^ _shift(x, 31, 64)
    return x.to(torch.int32), (x >> 32).to(torch.int32)  # to() keeps the low half


def hash_ids(low: torch.Tensor, high: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """31 random bits as int32, for broadcastable int32 keys and vocabulary ids.

    x = ids ^ low;  x ^= x >> 16;  x *= A;  x ^= x >> 15;  x += high;  x *= B;  x ^= x >> 16
    modulo 2^32, and the top bit dropped.
    """
    x = ids ^ low
    x ^= _shift(x, 16, 32)
    x *= _signed(MIX32[0], 32)
    x ^= _shift(x, 15, 32)
    x += high
    x *= _signed(MIX32[1], 32)
    x ^= _shift(x, 16, 32)
    return x.bitwise_and_(0x7FFFFFFF)


def gumbel(low: torch.Tensor, high: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float32: -log(E) with E = -log(1 - v) exponential, v uniform.

    v = (bits + 1/2) / 2^31 keeps its full precision near 0, where E is small and the winner of an
    argmax is found. The factor is the largest float32 below 2^-31, so that v < 1. A kernel without
    log1p takes log(1 - v) * v / (1 - (1 - v)), which equals it to rounding.
    """
    v = hash_ids(low, high, ids).to(torch.float32)
    v.add_(0.5).mul_(-(2.0**-31 - 2.0**-55))
    return v.log1p_().neg_().log_().neg_()


def _mix64_int(x: int) -> int:
    x &= MASK64
    for shift, factor in MIX64:
        x = ((x ^ (x >> shift)) * factor) & MASK64
    return x ^ (x >> 31)


def _signed(value: int, bits: int) -> int:
    return value - 2**bits if value >= 2 ** (bits - 1) else value


def _shift(x: torch.Tensor, count: int, bits: int) -> torch.Tensor:
    """Logical right shift of a signed tensor."""
    return (x >> count).bitwise_and_(2 ** (bits - count) - 1)
