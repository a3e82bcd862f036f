"""Weights of 4 or 8 bits: groups of inputs, each with a scale and a minimum of its own.

Every format that is read maps onto this one exactly: a weight is scale * code + minimum, with
codes that are not negative.
"""

from dataclasses import dataclass
from typing import Self

import torch

_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)  # shares of a group's range that the codes may span


@dataclass(frozen=True)
class Grouped:
    """Weights [..., N, K] in groups of G inputs, as they are filled: one byte a code.

    What products read is made of it when all are filled, and has 4 bits a code where no code needs
    more.
    """

    codes: torch.Tensor  # [..., N, K] uint8
    scales: torch.Tensor  # [..., N, K / G] fp32
    minimums: torch.Tensor  # [..., N, K / G] fp32

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def group(self) -> int:
        """Inputs that share a scale, G."""
        return self.codes.shape[-1] // self.scales.shape[-1]

    def __getitem__(self, rows: slice | int) -> Self:
        """A view of some rows [n, K] of N, or of one of several matrices."""
        return type(self)(self.codes[rows], self.scales[rows], self.minimums[rows])

    def __len__(self) -> int:
        return len(self.codes)

    def fill(self, other: "Grouped") -> None:
        """Take over weights of the same shape, whose groups may be larger: whole multiples."""
        times = other.group // self.group
        self.codes.copy_(other.codes)
        self.scales.copy_(other.scales.repeat_interleave(times, -1))
        self.minimums.copy_(other.minimums.repeat_interleave(times, -1))

    def dequantized(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weights [..., N, K], computed in fp32 and rounded once."""
        codes = self.codes.unflatten(-1, (-1, self.group)).float()
        weights = codes * self.scales[..., None] + self.minimums[..., None]
        return weights.flatten(-2).to(dtype)


def quantized(weight: torch.Tensor, bits: int, group: int) -> Grouped:
    """Weights [..., N, K], K a multiple of `group`, in the nearest codes of 4 or 8 bits.

    Each group takes the range, of some that are smaller than its own by up to a fifth, whose
    squared error is the least.
    """
    values = weight.float().unflatten(-1, (-1, group))
    low, high = values.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)  # zero is kept: padding stays as small
    largest = 2**bits - 1
    best = Grouped(torch.empty(0), low, high)
    least = torch.full_like(low, torch.inf)
    for clip in _CLIPS:
        scales = (high - low) * (clip / largest)
        scales = scales.where(scales > 0, torch.ones_like(scales))
        minimums = low * clip
        codes = ((values - minimums) / scales).round_().clamp_(0, largest)
        error = (codes * scales + minimums - values).square_().sum(-1, keepdim=True)
        better = error < least
        if clip == _CLIPS[0]:
            best, least = Grouped(codes, scales, minimums), error
            continue
        pairs = ((codes, best.codes), (scales, best.scales), (minimums, best.minimums))
        best = Grouped(*(new.where(better, old) for new, old in pairs))
        least = error.minimum(least)
    codes = best.codes.flatten(-2).to(torch.uint8)
    return Grouped(codes, best.scales[..., 0], best.minimums[..., 0])
