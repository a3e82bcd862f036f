"""The form in which a CPU's native product reads weights of 4 and 8 bits: panels of 32 rows.

Nothing is lost: codes have 4 bits where none needs more, scales and minimums 16 where all are
numbers of fp16, and minimums that follow from scales are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F

from minisgl import csrc
from minisgl.device.cpu import lazy_zeros
from minisgl.kernels.grouped_linear.weights import BLOCK, Grouped
from minisgl.kernels.native import address

WIDTH = 32
QUADS = BLOCK // 4
LARGE = 2**26  # bytes of which there is no second copy; less is no matter
_AT_ONCE = 64  # panels of a matrix that are packed together: what packing takes besides


@dataclass(frozen=True)
class GroupedPanels:
    """Weights [..., N, K]: 32 rows side by side, in blocks of 32 inputs; the last with zeros.

    A block has 8 times the codes of [32 rows, 4 inputs], or of 4 bits 4 times; those of the inputs
    from 16 on are then the high halves of the bytes.
    """

    codes: torch.Tensor  # [..., N / 32, K / 32, 8 or 4, 32, 4] uint8
    scales: torch.Tensor  # [..., N / 32, K / G, 32] fp16 or fp32
    minimums: torch.Tensor | None  # the same; None: -8 times the scale in 4 bits, -128 times in 8
    num_rows: int  # N
    dtype: torch.dtype
    activations: Literal["float", "int8"]

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.codes.shape[:-5], self.num_rows, BLOCK * self.codes.shape[-4]

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.codes.shape[-3] * 8 // QUADS

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What it holds in memory."""
        return self.codes, self.scales, *(() if self.minimums is None else (self.minimums,))

    @property
    def layout(self) -> tuple[Any, ...]:
        """(N, K, G, bits, whether scales are fp16), as native ops take them."""
        *_, n, k = self.shape
        return n, k, k // self.scales.shape[-2], self.bits, self.scales.dtype == torch.float16

    @property
    def addresses(self) -> tuple[int, int, int]:
        return self.codes.data_ptr(), self.scales.data_ptr(), address(self.minimums)

    def __getitem__(self, index: int) -> "GroupedPanels":
        """A view of one of several matrices."""
        least = None if self.minimums is None else self.minimums[index]
        return replace(self, codes=self.codes[index], scales=self.scales[index], minimums=least)

    def unpacked(self) -> Grouped:
        """The weights that it was made of."""
        (*_, n, _), codes = self.shape, self.codes
        if self.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], dim=-3)
        codes = codes.movedim(-2, -4).flatten(-3).flatten(-3, -2)[..., :n, :]

        def rows(numbers: torch.Tensor) -> torch.Tensor:
            return numbers.float().transpose(-1, -2).flatten(-3, -2)[..., :n, :]

        scales = rows(self.scales)
        least = -(2.0 ** (self.bits - 1)) * scales
        minimums = least if self.minimums is None else rows(self.minimums)
        return Grouped(codes, scales, minimums, self.dtype, self.activations)


def packed(weight: Grouped) -> Grouped | GroupedPanels:
    """A weight in panels, where a CPU has the native product or is about to; else itself. They may
    be made in its place, and it is then gone."""
    *others, n, _ = weight.shape
    fits = weight.device.type == "cpu" and weight.codes.numel() > 0
    if not fits or weight.dtype not in (torch.bfloat16, torch.float32):
        return weight
    if csrc.load("model_ops", wait=True) is None:
        return weight
    bits, padded = 4 if int(weight.codes.max()) <= 15 else 8, -n % WIDTH
    least = -(2.0 ** (bits - 1))
    follow = _hold(
        lambda low, scale: torch.equal(low, least * scale), weight.minimums, weight.scales
    )
    numbers = [weight.scales] if follow else [weight.scales, weight.minimums]
    small = all(_hold(_in_half, each) for each in numbers)

    def in_panels(rows: torch.Tensor) -> torch.Tensor:
        rows = F.pad(rows, (0, 0, 0, padded)) if padded else rows
        panels = rows.view(*others, -1, WIDTH, rows.shape[-1]).transpose(-1, -2)
        return _in_huge_pages(panels, torch.float16 if small else torch.float32)

    minimums = None if follow else in_panels(weight.minimums)
    made = in_panels(weight.scales), minimums, n, weight.dtype, weight.activations
    return GroupedPanels(_packed_codes(weight.codes, bits), *made)


def _hold(test: Callable[..., bool], *numbers: torch.Tensor) -> bool:
    """Whether a test of numbers [..., N, K / G] does, some rows after others."""
    rows = (each.flatten(0, -2).split(_AT_ONCE * WIDTH) for each in numbers)
    return all(test(*some) for some in zip(*rows, strict=True))


def _in_half(numbers: torch.Tensor) -> bool:
    half = numbers.half()
    return torch.equal(half.float(), numbers) and bool(half.isfinite().all())


def _packed_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [..., N, K] as panels hold them; large ones in their own place, where they fit."""
    *others, n, k = codes.shape
    shape = *others, -(-n // WIDTH), k // BLOCK, QUADS * bits // 8, WIDTH, 4
    fits = bits == 8 and n % WIDTH == 0 and codes.is_contiguous() and codes.nbytes > LARGE
    made = codes.view(shape) if fits else lazy_zeros(shape, torch.uint8)
    for first in range(0, shape[-5], _AT_ONCE):
        some = codes[..., first * WIDTH : (first + _AT_ONCE) * WIDTH, :]
        some = F.pad(some, (0, 0, 0, -some.shape[-2] % WIDTH))
        some = some.reshape(*others, -1, WIDTH, k // BLOCK, QUADS, 4).movedim(-4, -2)
        if bits == 4:
            some = some[..., : QUADS // 2, :, :] | some[..., QUADS // 2 :, :, :] << 4
        made[..., first : first + _AT_ONCE, :, :, :, :] = some.contiguous()
    return made


def _in_huge_pages(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A dense copy: a step reads all of it."""
    return lazy_zeros(tensor.shape, dtype).copy_(tensor)
