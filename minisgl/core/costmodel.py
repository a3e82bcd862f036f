"""What a step costs: a roofline over plain numbers, corrected by measured step times.

A step takes a fixed time plus the longer of its arithmetic and its memory traffic (Williams et
al., Roofline, 2009). Counted are the matrix products, attention, and the reading of weights and
KV; activations, small beside them, are not.
"""

from operator import add
from typing import Literal

import msgspec
from msgspec.structs import astuple

UNIT = 1e-3  # seconds, of the fixed time among the factors
SMALLEST = (0.0, 0.02, 0.02)  # of the factors: fixed in units, compute, memory
FORGETTING = 0.98  # weight of what was known, per step
MAX_UNCERTAINTY = 100.0
DEVIATION_RATE = 0.05
CASCADE_SECONDS = 5e-6  # estimated, per layer: one more launch, more partial results to merge


class ModelSizes(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes of a decoder. `intermediate` is that of one expert where there are experts."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    experts: int = 0
    experts_per_token: int = 0
    window: int | None = None  # sliding-window attention, in tokens
    windowed_layers: int = 0
    bytes_per_weight: float = 2.0
    bytes_per_kv: float = 2.0

    @property
    def attention_weights(self) -> int:
        """Weights of all attention projections."""
        projections = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * projections

    @property
    def mlp_weights(self) -> int:
        """Weights of one MLP (one expert) in all layers."""
        return self.layers * 3 * self.hidden * self.intermediate

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab

    def layer_weights(self, experts: float) -> float:
        """Weights of the layers that are read or multiplied by, with so many experts of each."""
        router = self.layers * self.hidden * self.experts
        return self.attention_weights + router + experts * self.mlp_weights

    @property
    def weights(self) -> float:
        """All weights of the matrix products."""
        return self.layer_weights(max(self.experts, 1)) + self.head_weights

    @property
    def kv_bytes_per_token(self) -> float:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_kv


class DevicePeaks(msgspec.Struct, frozen=True):
    """A device's peaks at the precision served, and the fixed time of a step."""

    flops: float  # per second
    bandwidth: float  # bytes per second
    overhead: float = 0.0  # seconds
    shared_keys: int = 1  # cascade attention reads them together in blocks of so many


DEVICES = {
    "a100": DevicePeaks(312e12, 2.04e12, 3e-4),
    "h100": DevicePeaks(989e12, 3.35e12, 3e-4),
    "h200": DevicePeaks(989e12, 4.8e12, 3e-4),
    "b200": DevicePeaks(2250e12, 8.0e12, 3e-4),
    "l4": DevicePeaks(121e12, 0.3e12, 3e-4),
    "l40s": DevicePeaks(362e12, 0.864e12, 3e-4),
    "rtx4090": DevicePeaks(165e12, 1.01e12, 3e-4),
    "cpu": DevicePeaks(0.2e12, 20e9, 1e-3, 256),  # about two server cores
}


def cascade_min_tokens(model: ModelSizes, device: DevicePeaks) -> int:
    """How many tokens of keys and values a layer reads in the time that cascade attention adds; at
    least one block of them."""
    per_layer = model.kv_bytes_per_token / model.layers
    return max(device.shared_keys, round(CASCADE_SECONDS * device.bandwidth / per_layer))


class Work(msgspec.Struct, frozen=True, gc=False):
    """What a step computes, in tokens."""

    num_tokens: int  # through the layers
    num_pairs: int  # (query, key) pairs of attention, per head and layer
    num_context: int  # KV positions read, each once per chunk
    num_sampled: int  # positions whose logits are computed

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(add, astuple(self), astuple(other)))


def decode_work(num_tokens: int, num_context: int) -> Work:
    """One token for each of `num_tokens` sequences that hold `num_context` together."""
    return Work(num_tokens, num_context, num_context, num_tokens)


def prefill_work(num_tokens: int, start: int = 0, *, samples: bool = True) -> Work:
    """A chunk of one prompt, after `start` tokens of it; `samples` where it ends the prompt."""
    pairs = num_tokens * start + num_tokens * (num_tokens + 1) // 2
    return Work(num_tokens, pairs, start + num_tokens, int(samples and num_tokens > 0))


class Cost(msgspec.Struct, frozen=True):
    """The cost of a step and what bounds it."""

    flops: float
    bytes: float
    compute_seconds: float
    memory_seconds: float
    overhead: float

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.flops / self.bytes if self.bytes else 0.0

    @property
    def bound(self) -> Literal["compute", "memory"]:
        return "compute" if self.compute_seconds > self.memory_seconds else "memory"

    @property
    def seconds(self) -> float:
        return self.overhead + max(self.compute_seconds, self.memory_seconds)


class CostModel:
    """Predicts step times, and learns from measured ones.

    The fixed time and one factor each for compute and memory start at the data sheet's values and
    follow measurements by recursive least squares with forgetting (Ljung, System Identification,
    1999), on relative errors, so that short steps count as much as long ones.
    """

    def __init__(self, model: ModelSizes, device: DevicePeaks) -> None:
        self.model = model
        self.device = device
        self.num_observed = 0
        self.deviation = 0.0  # mean |measured / predicted - 1| of late
        self._fixed, self._compute, self._memory = device.overhead, 1.0, 1.0
        self._covariance = [[10.0 * (i == j) for j in range(3)] for i in range(3)]

    def cost(self, work: Work) -> Cost:
        flops, traffic = self._flops(work), self._bytes(work)
        return Cost(
            flops,
            traffic,
            self._compute * flops / self.device.flops,
            self._memory * traffic / self.device.bandwidth,
            self._fixed,
        )

    def predict(self, work: Work) -> float:
        """Seconds."""
        return self.cost(work).seconds

    def observe(self, work: Work, seconds: float) -> None:
        """Learn from one measured step; times that are not positive are ignored."""
        if seconds <= 0.0 or not work.num_tokens:
            return
        cost = self.cost(work)
        self.num_observed += 1
        rate = max(DEVIATION_RATE, 1.0 / self.num_observed)
        off = min(abs(seconds / cost.seconds - 1.0), 1.0)
        self.deviation += rate * (off - self.deviation)
        # The terms of this step, as shares of its time: fixed, and whichever bounds it, the `k`th.
        factors = [self._fixed / UNIT, self._compute, self._memory]
        k = 1 if cost.bound == "compute" else 2
        own = (cost.compute_seconds, cost.memory_seconds)[k - 1] / factors[k]
        fixed, bound = UNIT / seconds, own / seconds
        error = 1.0 - fixed * factors[0] - bound * factors[k]
        p, q, r = self._covariance
        x, y, z = direction = [row[0] * fixed + row[k] * bound for row in (p, q, r)]
        scale = 1.0 / (FORGETTING + fixed * x + bound * direction[k])
        # One regime alone would inflate the uncertainty of the other without end.
        growth = 1.0 if p[0] + q[1] + r[2] > MAX_UNCERTAINTY else 1.0 / FORGETTING
        for i, row in enumerate(self._covariance):
            share = scale * direction[i]
            factors[i] = max(factors[i] + share * error, SMALLEST[i])
            row[:] = (
                growth * (row[0] - share * x),
                growth * (row[1] - share * y),
                growth * (row[2] - share * z),
            )
        self._fixed, self._compute, self._memory = factors[0] * UNIT, factors[1], factors[2]

    def _flops(self, work: Work) -> float:
        model = self.model
        per_token = model.layer_weights(model.experts_per_token if model.experts else 1)
        linear = per_token * work.num_tokens + model.head_weights * work.num_sampled
        pairs = self._full_layers(work) * work.num_pairs
        return 2.0 * linear + 4.0 * model.heads * model.head_dim * pairs

    def _bytes(self, work: Work) -> float:
        model, touched = self.model, 1.0
        if model.experts:
            missed = (1.0 - model.experts_per_token / model.experts) ** work.num_tokens
            touched = model.experts * (1.0 - missed)
        weights = model.layer_weights(touched) + model.head_weights * (work.num_sampled > 0)
        moved = self._full_layers(work) * work.num_context + model.layers * work.num_tokens
        return model.bytes_per_weight * weights + model.kv_bytes_per_token / model.layers * moved

    def _full_layers(self, work: Work) -> float:
        """Layers of full attention that have as much to do: a window shows a query only a part."""
        model = self.model
        if model.window is None or not work.num_pairs:
            return model.layers
        seen = min(1.0, work.num_tokens * model.window / work.num_pairs)
        return model.layers - model.windowed_layers * (1.0 - seen)
