"""Filling one weight from what a checkpoint stores, or at random: copied, taken over or rounded."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

from minisgl.kernels.grouped_linear.weights import Grouped, quantized
from minisgl.layers.weights import Weight

BLOCK = 1_000_003  # random numbers; prime: no two rows of a matrix begin at the same one
PIECE = 2**24  # elements copied at once, which others than safetensors' are dequantised for
ROUNDED = 2**20  # elements at once that codes are made for: they stay in the last cache


def fill(weight: Weight, stored: Any, bits: int) -> None:
    """Fill a weight some rows after others, so that little is held beside it.

    stored: a slice of an open safetensors file, or what is read like one, and may have `group` and
    `grouped` if it is stored in codes. Codes are taken over; floats for codes rounded to `bits`.
    """
    first, *others = weight.slices
    target, grouped = weight.target, isinstance(weight.target, Grouped)
    width = max(1, math.prod(weight.shape[1:]))
    start, step = first.start or 0, max(1, (ROUNDED if grouped else PIECE) // width)
    for at in range(0, len(target), step):
        part = target[at : at + step]
        rows = slice(start + at, start + at + len(part))
        if isinstance(part, torch.Tensor):
            part.copy_(torch.as_tensor(stored[(rows, *others)]))
        elif getattr(stored, "group", None) is None:
            floats = torch.as_tensor(stored[(rows, *others)]).to(part.device)
            part.fill(quantized(floats, bits, part.group))
        else:
            _take_over(part, Grouped(*map(torch.as_tensor, stored.grouped(rows))), others[0])


def _take_over(part: Grouped, found: Grouped, columns: slice) -> None:
    """Fill it with its columns of whole rows, whose groups may be larger."""
    start, stop, _ = columns.indices(found.shape[1])
    times = found.group // part.group
    groups = slice(start // part.group, stop // part.group)
    part.codes.copy_(found.codes[:, columns])
    part.scales.copy_(found.scales.repeat_interleave(times, 1)[:, groups])
    part.minimums.copy_(found.minimums.repeat_interleave(times, 1)[:, groups])


class RandomWeights:
    """Random weights of such shapes, read like an open safetensors file.

    Matrices keep the scale of their input, norms are near one and biases small. Every weight is
    taken from one block of random numbers, beginning at a place of its own and repeating it:
    drawing new numbers for all would take seconds per billion.
    """

    name = "random weights"

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], seed: int, device: torch.device
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._numbers = torch.empty(BLOCK).uniform_(-1.0, 1.0, generator=generator).to(device)
        self._shapes = shapes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        pass

    def keys(self) -> list[str]:
        return list(self._shapes)

    def get_slice(self, name: str) -> "RandomSlice":
        shape = self._shapes[name]
        if name.endswith(".bias"):
            block = self._numbers * 0.1
        elif len(shape) == 1:
            block = self._numbers * 0.5 + 1.0
        else:
            block = self._numbers * (3.0 / shape[1]) ** 0.5
        return RandomSlice(block, zlib.crc32(name.encode()) % BLOCK, shape)


@dataclass(frozen=True)
class RandomSlice:
    """One weight, whose numbers begin at `first` of the block."""

    block: torch.Tensor
    first: int
    shape: tuple[int, ...]

    def __getitem__(self, slices: tuple[slice, ...]) -> torch.Tensor:
        rows, *others = slices
        start, stop, _ = rows.indices(self.shape[0])
        width = math.prod(self.shape[1:])
        first, count = (self.first + start * width) % BLOCK, (stop - start) * width
        repeated = self.block.repeat(-(-(first + count) // BLOCK))[first : first + count]
        return repeated.view(-1, *self.shape[1:])[(slice(None), *others)]
