"""Sampling of one token, slowly and on its own: numpy and Python numbers, one row at a time."""

import math
from collections.abc import Sequence

import numpy as np

from minisgl.core.request import SamplingParams

M64 = 2**64 - 1
M32 = 2**32 - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix64(x: int) -> int:
    x &= M64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)


def row_key(seed: int, choice: int) -> int:
    return mix64(mix64(seed + GOLDEN) + choice * 256 * GOLDEN)


def noise_bits(key: int, position: int, token_id: int) -> int:
    k = mix64(key + (position + 1) * GOLDEN)
    low, high = k & M32, k >> 32
    x = token_id ^ low
    x ^= x >> 16
    x = x * 0x7FEB352D & M32
    x ^= x >> 15
    x = (x + high) & M32
    x = x * 0x846CA68B & M32
    x ^= x >> 16
    return x & 0x7FFFFFFF


def gumbel(key: int, position: int, token_id: int) -> float:
    v = (noise_bits(key, position, token_id) + 0.5) * 2.0**-31
    return -math.log(-math.log1p(-min(v, 1 - 2.0**-24)))


def adjusted(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: Sequence[int],
    output: Sequence[int],
    eos: Sequence[int] = (),
    allowed: set[int] | None = None,
) -> np.ndarray:
    """Penalties, biases, bans and a grammar's mask on logits [V], float64."""
    x, params = logits.astype(np.float64), params.completed()
    for token in set(prompt) | set(output):
        factor = params.repetition_penalty
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
    for token in set(output):
        times = list(output).count(token)
        x[token] -= params.frequency_penalty * times + params.presence_penalty
    for token, bias in params.logit_bias:
        x[token] += bias
    if len(output) < params.min_tokens:
        for token in {*params.stop_token_ids, *(() if params.ignore_eos else eos)}:
            x[token] = -math.inf
    if allowed is not None:
        for token in range(len(x)):
            if token not in allowed:
                x[token] = -math.inf
    return x


def kept(x: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The tempered logits z [V] with -inf for what the filters drop."""
    params = params.completed()
    z = x / params.temperature
    order = sorted(z[np.isfinite(z)], reverse=True)
    if 0 < params.top_k < len(order):
        z = np.where(z >= order[params.top_k - 1], z, -math.inf)
    weights = np.exp(z - z.max())
    if params.top_p < 1:
        threshold = -math.inf
        for value in sorted(set(z[np.isfinite(z)]), reverse=True):
            threshold = value
            if weights[z >= value].sum() >= params.top_p * weights.sum():
                break
        z = np.where(z >= threshold, z, -math.inf)
    return np.where(weights >= params.min_p, z, -math.inf)


def probabilities(x: np.ndarray, params: SamplingParams) -> np.ndarray:
    """What sampling must follow, [V]."""
    z = kept(x, params)
    weights = np.exp(z - z.max())
    return weights / weights.sum()


def draw(x: np.ndarray, params: SamplingParams, choice: int, position: int) -> tuple[int, float]:
    """The token drawn from adjusted logits [V], and by how much its score won."""
    if params.temperature == 0:
        scores = x
    else:
        key = row_key(params.seed or 0, choice)
        z = kept(x, params)
        noise = [gumbel(key, position, i) if np.isfinite(z[i]) else 0.0 for i in range(len(z))]
        scores = z + np.array(noise)
    best = int(np.argmax(scores))
    others = np.delete(scores, best)
    return best, float(scores[best] - others.max()) if len(others) else math.inf
