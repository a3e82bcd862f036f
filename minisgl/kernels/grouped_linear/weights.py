"""Weights of 4 or 8 bits: groups of inputs, each with a scale and a minimum of its own.

Every format that is read maps onto this one exactly: a weight is scale * code + minimum, with
codes that are not negative.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import torch

from minisgl import csrc

BLOCK = 32  # inputs that are rounded together, of which a group has one or several

_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8)  # shares of a group's range that the codes may span
_PIECE = 2**15  # weights rounded at once by a CPU with nothing native: they stay in the cache


@dataclass(frozen=True)
class Grouped:
    """Weights [..., N, K] in groups of G inputs, as they are filled: one byte a code.

    What products read is made of it when all are filled, and has 4 bits a code where no code needs
    more. Raises ValueError unless K is a multiple of G, and G of 32.
    """

    codes: torch.Tensor  # [..., N, K] uint8
    scales: torch.Tensor  # [..., N, K / G] fp32
    minimums: torch.Tensor  # [..., N, K / G] fp32
    dtype: torch.dtype = torch.float32  # of its rows, and of what it is multiplied with
    activations: Literal["float", "int8"] = "float"  # int8: products round them in blocks of 32

    def __post_init__(self) -> None:
        k, groups = self.codes.shape[-1], self.scales.shape[-1]
        if groups == 0 or k % (BLOCK * groups):
            group = k / max(groups, 1)
            raise ValueError(
                f"K must be a multiple of the group, and the group of {BLOCK}; "
                f"got K {k} and a group of {group:g}"
            )

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What it holds in memory."""
        return self.codes, self.scales, self.minimums

    @property
    def group(self) -> int:
        """Inputs that share a scale, G."""
        return self.codes.shape[-1] // self.scales.shape[-1]

    def __getitem__(self, rows: slice | int) -> Self:
        """A view of some rows [n, K] of N, or of one of several matrices."""
        codes, scales, minimums = (tensor[rows] for tensor in self.tensors)
        return replace(self, codes=codes, scales=scales, minimums=minimums)

    def __len__(self) -> int:
        return len(self.codes)

    def reshaped(self, *leading: int) -> Self:
        """The same rows as [*leading, K]."""
        codes, scales, minimums = (each.reshape(*leading, each.shape[-1]) for each in self.tensors)
        return replace(self, codes=codes, scales=scales, minimums=minimums)

    def chosen(self, ids: torch.Tensor) -> Self:
        """Copies of rows `ids` [T] of N. Raises IndexError for an id without a row."""
        codes, scales, minimums = (tensor.index_select(0, ids) for tensor in self.tensors)
        return replace(self, codes=codes, scales=scales, minimums=minimums)

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

    In 8 bits zero is in the middle of the range. In 4 bits each group takes the range, of some that
    are smaller than its own by up to a fifth, whose squared error is the least. Scales and minimums
    are numbers that fp16 has. Raises ValueError for weights that are not finite, or too large, and
    for groups of other than multiples of 32.
    """
    if group % BLOCK or weight.shape[-1] % group:
        k = weight.shape[-1]
        raise ValueError(f"K must be a multiple of the group, and it of {BLOCK}; got {k}, {group}")
    rows, shape = weight.reshape(-1, group), (*weight.shape[:-1], weight.shape[-1] // group)
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    scales, minimums = (torch.empty(len(rows), 1, device=rows.device) for _ in range(2))
    native = csrc.load("model_ops", wait=True) if rows.device.type == "cpu" else None
    if native is None:
        at_once = max(1, _PIECE // group if rows.device.type == "cpu" else len(rows))
        pieces = (each.split(at_once) for each in (rows, codes, scales, minimums))
        for piece, *into in zip(*pieces, strict=True):
            for tensor, found in zip(into, quantized_reference(piece, bits), strict=True):
                tensor.copy_(found)
    else:
        rows = (rows if rows.dtype == torch.bfloat16 else rows.float()).contiguous()
        at = (each.data_ptr() for each in (rows, codes, scales, minimums))
        is_bf16, threads = rows.dtype == torch.bfloat16, torch.get_num_threads()
        native.round_to_codes(*at, len(rows), group, bits, is_bf16, threads)
    if not (scales.isfinite().all() and minimums.isfinite().all()):
        most = f"{float(weight.abs().max()):.4g}"
        raise ValueError(f"weights must be within fp16's range to be rounded, got {most}")
    return Grouped(codes.view(weight.shape), scales.view(shape), minimums.view(shape))


def quantized_reference(
    rows: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes of groups [R, G] in floats, and scales and minimums [R, 1], infinite where none fit."""
    values = rows.float()
    if bits == 8:
        scales = _to_half(values.abs().amax(-1, keepdim=True) / 127)
        return _nearest(values, scales, -128 * scales, 255), scales, -128 * scales
    low, high = values.aminmax(dim=-1, keepdim=True)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)  # zero is kept: padding stays as small
    least = torch.full_like(low, torch.inf, dtype=torch.float64)
    found = torch.zeros_like(values), least.float(), least.float()
    for clip in _CLIPS:
        scales, minimums = _to_half((high - low) * (clip / 15)), _to_half(low * clip)
        codes = _nearest(values, scales, minimums, 15)
        squares = (codes * scales + minimums).sub_(values).square_()
        error = squares.sum(-1, keepdim=True, dtype=torch.float64)  # in nearly any order the same
        better, least = error < least, error.minimum(least)
        tried = zip((codes, scales, minimums), found, strict=True)
        found = tuple(new.where(better, old) for new, old in tried)
    return found


def _to_half(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.half().float()


def _nearest(
    values: torch.Tensor, scales: torch.Tensor, minimums: torch.Tensor, largest: int
) -> torch.Tensor:
    steps = scales.where(scales > 0, 1.0)
    return (values - minimums).div_(steps).round_().clamp_(0, largest)
