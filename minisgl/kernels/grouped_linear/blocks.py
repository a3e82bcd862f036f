"""The form in which a GPU's kernels read weights of 4 and 8 bits: 32 bytes of each row together.

As in panels nothing is lost, and what need not be stored is not. However many rows a program takes,
their codes lie in one piece, and so do their scales.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from minisgl.kernels.grouped_linear.weights import BLOCK, Grouped

Form = tuple[int, int, bool, bool]  # bits, G, whether scales are fp16, and minimums stored
# Numbers of rows at which another launch begins or ends (`portable`). Others launch as these, or,
# with all of K in one part, as the largest step does.
ROW_EDGES = (1, 2, 3, 16, 17, 64, 65)
INT8_ACTIVATIONS = "activations must be float: nothing on a GPU rounds them"


@dataclass(frozen=True)
class GroupedBlocks:
    """Weights [..., N, K] in blocks of 32 bytes of each row: of 32 inputs in 8 bits, of 64 in 4.

    In 4 bits the low halves of the bytes are the first 32 inputs, the high halves the others; the
    last block's may be beyond K, and are zeros.
    """

    codes: torch.Tensor  # [..., blocks, N, 32] uint8
    scales: torch.Tensor  # [..., K / G, N] fp16 or fp32
    minimums: torch.Tensor | None  # the same; None: -8 times the scale in 4 bits, -128 times in 8
    num_inputs: int  # K
    dtype: torch.dtype
    bits: int  # of a code
    activations: Literal["float"] = "float"

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.codes.shape[:-3], self.codes.shape[-2], self.num_inputs

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What it holds in memory."""
        return self.codes, self.scales, *(() if self.minimums is None else (self.minimums,))

    @property
    def constants(self) -> dict[str, Any]:
        """As kernels take them."""
        whole = self.num_inputs * self.bits % (8 * BLOCK) == 0
        facts = {"GROUP": self.group, "BITS": self.bits}
        return facts | {"MINIMUMS": self.minimums is not None, "WHOLE": whole}

    @property
    def pointers(self) -> tuple[torch.Tensor, ...]:
        """As kernels take them: of minimums that are not stored any."""
        minimums = self.scales if self.minimums is None else self.minimums
        return self.codes, self.scales, minimums

    @property
    def form(self) -> Form:
        small, least = self.scales.dtype == torch.float16, self.minimums is not None
        return self.bits, self.group, small, least

    @property
    def group(self) -> int:
        """Inputs that share a scale, G."""
        return self.num_inputs // self.scales.shape[-2]

    def __getitem__(self, index: int) -> "GroupedBlocks":
        """A view of one of several matrices."""
        least = None if self.minimums is None else self.minimums[index]
        return replace(self, codes=self.codes[index], scales=self.scales[index], minimums=least)

    def chosen(self, ids: torch.Tensor) -> Grouped:
        """Copies of rows `ids` [T] of N, of one matrix."""
        codes, scales, *least = (tensor.index_select(1, ids) for tensor in self.tensors)
        minimums = least[0] if least else None
        return replace(self, codes=codes, scales=scales, minimums=minimums).unpacked()

    def unpacked(self) -> Grouped:
        """The weights that it was made of."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], dim=-1)
        codes = codes.transpose(-3, -2).flatten(-2)[..., : self.num_inputs].contiguous()
        scales = self.scales.float()
        least = -(2.0 ** (self.bits - 1)) * scales
        minimums = least if self.minimums is None else self.minimums.float()
        numbers = (each.mT.contiguous() for each in (scales, minimums))
        return Grouped(codes, *numbers, self.dtype)


def packed(weight: Grouped) -> GroupedBlocks:
    """A weight [..., N, K] in blocks: in 4 bits where no code needs more; scales in 16 bits where
    fp16 has all of them, and minimums only where they do not follow from scales. Reads it on the
    host. Raises ValueError where inputs are to be rounded to 8 bits: on a GPU nothing does so."""
    if weight.activations != "float":
        raise ValueError(INT8_ACTIVATIONS)
    k = weight.shape[-1]
    bits = 4 if weight.codes.numel() and int(weight.codes.max()) <= 15 else 8
    per_block = BLOCK * 8 // bits
    codes = torch.nn.functional.pad(weight.codes, (0, -k % per_block))
    codes = codes.unflatten(-1, (-1, per_block)).transpose(-3, -2)
    if bits == 4:
        codes = codes[..., :BLOCK] | codes[..., BLOCK:] << 4
    scales, minimums = weight.scales, weight.minimums
    follow = torch.equal(minimums, -(2.0 ** (bits - 1)) * scales)
    small = _is_half(scales) and (follow or _is_half(minimums))

    def by_group(numbers: torch.Tensor) -> torch.Tensor:
        return numbers.mT.to(torch.float16 if small else torch.float32).contiguous()

    least = None if follow else by_group(minimums)
    return GroupedBlocks(codes.contiguous(), by_group(scales), least, k, weight.dtype, bits)


def empty(form: Form, like: torch.Tensor) -> GroupedBlocks:
    """A weight of the form in the place of floats [..., N, K], its content any."""
    (bits, group, small, least), (*others, n, k) = form, like.shape
    codes = like.new_empty(*others, -(-k * bits // (8 * BLOCK)), n, BLOCK, dtype=torch.uint8)
    dtype = torch.float16 if small else torch.float32
    scales = like.new_empty(*others, k // group, n, dtype=dtype)
    minimums = torch.empty_like(scales) if least else None
    return GroupedBlocks(codes, scales, minimums, k, like.dtype, bits)


def _is_half(numbers: torch.Tensor) -> bool:
    """Whether fp16 has all of them."""
    half = numbers.half()
    return torch.equal(half.float(), numbers) and bool(half.isfinite().all())
