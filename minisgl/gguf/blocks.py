"""Blocks of quantised GGUF tensors as codes with scales and minimums: w = scale * code + minimum.

The layouts are those of ggml's ggml-quants.c. Each group has 32 weights, and its values in fp32 are
to the bit what dequantising gives; but Q6_K's groups have 16, so it is rounded to 8 bits anew.
"""

from collections.abc import Callable, Mapping

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

Array = np.ndarray
Groups = tuple[Array, Array, Array]  # codes uint8 [B, 32], scales and minimums fp32, one for 32

GROUP = 32  # weights
_WORD = np.arange(32, dtype=np.uint32)


def is_quantised(kind: GGMLQuantizationType) -> bool:
    return kind.name in _LAYOUTS or kind.name == "Q6_K"


def grouped(rows: Array, kind: GGMLQuantizationType) -> Groups:
    """Codes [N, K] uint8, scales and minimums [N, K / 32] fp32 of rows of a quantised type as they
    are stored, uint8 [N, bytes of a row]."""
    if kind.name == "Q6_K":
        codes, scales, minimums = _rounded(dequantize(rows, kind).reshape(-1, GROUP))
    else:
        size, read = _LAYOUTS[kind.name]
        codes, scales, minimums = read(rows.reshape(-1, size))
    count = len(rows)
    return codes.reshape(count, -1), scales.reshape(count, -1), minimums.reshape(count, -1)


def first_infinite(rows: Array, kind: GGMLQuantizationType) -> tuple[int, int, float] | None:
    """Row, block in it and value of the first scale or minimum in fp16 that is not finite, of rows
    [N, bytes of a row] of a quantised type; None where all are, or it has no such numbers."""
    found = []
    for first in _NUMBERS.get(kind.name, ()):
        size = GGML_QUANT_SIZES[kind][1]
        numbers = _halves(rows.reshape(-1, size), first)
        if len(wrong := np.flatnonzero(~np.isfinite(numbers))):
            found.append((*divmod(int(wrong[0]), rows.shape[1] // size), float(numbers[wrong[0]])))
    return min(found, default=None)


def _halves(blocks: Array, first: int) -> Array:
    """The fp16 number at byte `first` of each block, in fp32 [B]."""
    return np.ascontiguousarray(blocks[:, first : first + 2]).view("<f2")[:, 0].astype(np.float32)


def _nibbles(packed: Array) -> Array:
    """Bytes [..., n] as codes [..., 2 n]: the low halves before the high ones."""
    return np.concatenate((packed & 15, packed >> 4), axis=-1)


def _fifth_bits(blocks: Array, first: int) -> Array:
    """What the words at byte `first` of each block add to its codes, [B, 32]."""
    words = np.ascontiguousarray(blocks[:, first : first + 4]).view("<u4")
    return ((words >> _WORD & 1) << 4).astype(np.uint8)


def _q4_0(blocks: Array) -> Groups:
    scales = _halves(blocks, 0)
    return _nibbles(blocks[:, 2:]), scales, -8 * scales


def _q4_1(blocks: Array) -> Groups:
    return _nibbles(blocks[:, 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q5_0(blocks: Array) -> Groups:
    scales = _halves(blocks, 0)
    return _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2), scales, -16 * scales


def _q5_1(blocks: Array) -> Groups:
    codes = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return codes, _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(blocks: Array) -> Groups:
    scales = _halves(blocks, 0)
    return blocks[:, 2:] ^ 128, scales, -128 * scales  # int8 + 128


def _of_8_groups(blocks: Array) -> tuple[Array, Array]:
    """Scales and minimums [B, 8] of blocks that begin with one of each in fp16, by which the six
    bits of every group's are multiplied."""
    low, high, mixed = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate((low & 63, (mixed & 15) | (low >> 6 << 4)), axis=1)
    minimums = np.concatenate((high & 63, (mixed >> 4) | (high >> 6 << 4)), axis=1)
    return _halves(blocks, 0)[:, None] * scales, -_halves(blocks, 2)[:, None] * minimums


def _q4_k(blocks: Array) -> Groups:
    return _nibbles(blocks[:, 16:].reshape(-1, 4, 32)), *_of_8_groups(blocks)


def _q5_k(blocks: Array) -> Groups:
    codes = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return codes | fifth << 4, *_of_8_groups(blocks)


def _rounded(weights: Array) -> Groups:
    """The nearest codes of 8 bits for weights [B, 32], by scales that fp16 has."""
    scales = (np.abs(weights).max(axis=1) / 127).astype(np.float16).astype(np.float32)
    steps = weights / np.where(scales > 0, scales, 1)[:, None]
    codes = np.clip(np.rint(steps), -128, 127) + 128
    return codes.astype(np.uint8), scales, -128 * scales


_LAYOUTS: Mapping[str, tuple[int, Callable[[Array], Groups]]] = {
    "Q4_0": (18, _q4_0),
    "Q4_1": (20, _q4_1),
    "Q5_0": (22, _q5_0),
    "Q5_1": (24, _q5_1),
    "Q8_0": (34, _q8_0),
    "Q4_K": (144, _q4_k),
    "Q5_K": (176, _q5_k),
}
# Bytes of a block where its numbers in fp16 begin.
_NUMBERS: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q6_K": (208,),
}
