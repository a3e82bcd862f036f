"""Tables of cosines and sines for rotary embedding, with the scalings that checkpoints ask for."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al., "Extending Context Window of Large Language
    Models via Positional Interpolation", 2023)."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: wavelengths above original_context / low_freq_factor are stretched by `factor`,
    those below original_context / high_freq_factor kept, the ones between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models",
    2023): dimensions that turn more than beta_fast times within the original context are kept,
    less than beta_slow are stretched by `factor`, a ramp between; both tables are multiplied by
    `attention_factor`."""

    factor: float
    original_context: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # round the ramp's ends to whole dimensions


@dataclass(frozen=True)
class Rope:
    """One kind of rotary embedding: layers with equal `Rope`s share one table."""

    theta: float
    rotary_dim: int  # leading dimensions of a head that turn; even
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None

    def inverse_frequencies(self) -> torch.Tensor:
        """Radians per position of each pair, [rotary_dim / 2] float64."""
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / self.rotary_dim
        frequencies = self.theta**-exponents
        scaling = self.scaling
        if isinstance(scaling, LinearScaling):
            return frequencies / scaling.factor
        if isinstance(scaling, Llama3Scaling):
            turns = frequencies * scaling.original_context / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
            return frequencies * (kept + (1.0 - kept) / scaling.factor)
        if isinstance(scaling, YarnScaling):
            low, high = self._yarn_dim(scaling.beta_fast), self._yarn_dim(scaling.beta_slow)
            if scaling.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, self.rotary_dim - 1)
            if low == high:
                high += 0.001  # avoids a division by zero
            pairs = torch.arange(self.rotary_dim // 2, dtype=torch.float64)
            stretched = ((pairs - low) / (high - low)).clamp(0.0, 1.0)
            return frequencies * (1.0 - stretched + stretched / scaling.factor)
        return frequencies

    def _yarn_dim(self, turns: float) -> float:
        """The (fractional) pair that makes `turns` turns within the original context."""
        assert isinstance(self.scaling, YarnScaling)
        ratio = self.scaling.original_context / (turns * 2 * math.pi)
        return self.rotary_dim * math.log(ratio) / (2 * math.log(self.theta))

    def table(self, positions: int, device: torch.device) -> torch.Tensor:
        """[positions, rotary_dim] fp32: cosines in the first half, sines in the second."""
        frequencies = self.inverse_frequencies()
        angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
        scale = self.scaling.attention_factor if isinstance(self.scaling, YarnScaling) else 1.0
        table = torch.empty(positions, self.rotary_dim, dtype=torch.float32)
        half = self.rotary_dim // 2
        table[:, :half] = angles.cos() * scale
        table[:, half:] = angles.sin() * scale
        return table.to(device)
