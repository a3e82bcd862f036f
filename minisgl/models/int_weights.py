"""Checkpoints of 4 and 8 bit weights as GPTQ, AWQ and compressed-tensors store them.

Their tensors by matrix, of N outputs and K inputs in groups of G, with codes packed into words of
int32, the first in the lowest bits; a weight is scale * (code - zero):

- GPTQ: `qweight` packed along K [K / 8, N], `scales` [K / G, N], `qzeros` [K / G, N / 8], each one
  less than it is unless the format is gptq_v2, and `g_idx`, the group of each input
- AWQ: `qweight` [K, N / 8], `qzeros` and `scales`; words hold columns in the order of `_AWQ`
- compressed-tensors: `weight_packed` [N, K / 8], or `weight` in int8, `weight_scale` [N, K / G],
  and `weight_zero_point`, packed along N, where zero is not in the middle of the range;
  `weight_shape` [2] says N and K
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from minisgl.kernels.grouped_linear.weights import Grouped
from minisgl.models.files import open_safetensors
from minisgl.models.int_config import IntFormat

_PARTS = {
    "gptq": "qweight qzeros scales g_idx",
    "awq": "qweight qzeros scales",
    "compressed-tensors": "weight_packed weight weight_scale weight_zero_point weight_shape",
}
_AWQ = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where in a word each of eight columns is
_TYPES = {
    **dict.fromkeys(("qweight", "qzeros", "weight_packed"), ("I32",)),
    **dict.fromkeys(("scales", "weight_scale"), ("F16", "BF16", "F32")),
    "weight": ("I8",),
    "weight_zero_point": ("I32", "I8"),
    **dict.fromkeys(("g_idx", "weight_shape"), ("I32", "I64")),
}
_ONES = {4: 0x11111111, 8: 0x01010101}  # one for each code of a word


class IntCheckpoint:
    """All files of such a checkpoint, read like one open safetensors file of its matrices."""

    def __init__(self, files: Sequence[Path], form: IntFormat) -> None:
        self.name = files[0].parent.name
        self._form = form
        self._files: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        with self:
            for file in files:
                for name in self._opened(file).keys():  # noqa: SIM118 (it is not a mapping)
                    if name in self._files:
                        where = f"{file.name}: {name}"
                        raise ValueError(f"{where} is in {self._files[name].name} too")
                    self._files[name] = file
        ending = f".{form.codes}"
        whole = {name.removesuffix(ending) for name in self._files if name.endswith(ending)}
        if form.codes == "weight":  # which others are called, too
            whole = {name for name in whole if f"{name}.weight_scale" in self._files}
        self.matrices = {f"{name}.weight": name for name in whole}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._open.clear()

    def keys(self) -> list[str]:
        """The names of matrices, and of what is not quantised."""
        parts = _PARTS[self._form.method].split()
        inside = {f"{matrix}.{part}" for matrix in self.matrices.values() for part in parts}
        return [*self.matrices, *(name for name in self._files if name not in inside)]

    def get_slice(self, name: str) -> Any:
        if name not in self.matrices:
            return self._tensor(name)
        matrix = self.matrices[name]
        parts = {part: f"{matrix}.{part}" for part in _PARTS[self._form.method].split()}
        there = {part: self._tensor(name) for part, name in parts.items() if name in self._files}
        return IntMatrix(f"{self.name}: {matrix}", self._form, there)

    def _tensor(self, name: str) -> Any:
        return self._opened(self._files[name]).get_slice(name)

    def _opened(self, file: Path) -> Any:
        if file not in self._open:
            self._open[file] = open_safetensors(file)
        return self._open[file]


class IntMatrix:
    """One matrix [N, K], of which rows can be had as they are stored, and parts dequantised.

    Raises ValueError naming the tensor that is missing, has or states another shape than the others
    ask for, has its inputs in groups in another order than their own, or is not finite.
    """

    def __init__(self, where: str, form: IntFormat, parts: Mapping[str, Any]) -> None:
        self._where, self._form, self._parts = where, form, parts
        self._per_word = 32 // form.bits
        names = "scales", "qzeros"
        if form.method == "compressed-tensors":
            names = "weight_scale", "weight_zero_point"
        scales = names[0]
        for needed in names[: 1 + form.needs_zeros]:
            if needed not in parts:
                raise ValueError(f"{where} has {form.codes}, but no {needed}")
        for name, part in parts.items():
            kind, allowed = part.get_dtype(), _TYPES.get(name, ())
            if allowed and kind not in allowed:
                raise ValueError(f"{where}.{name} must be in {' or '.join(allowed)}, got {kind}")
        for name in (form.codes, scales):
            if len(shape := parts[name].get_shape()) != 2 or 0 in shape:
                raise ValueError(f"{where}.{name} must be a matrix, got shape {shape}")
        self.shape, shapes = _shapes(form, {name: part.get_shape() for name, part in parts.items()})
        for name, part in parts.items():
            if (shape := part.get_shape()) != (asked := shapes.get(name, shape)):
                raise ValueError(f"{where}.{name} has shape {shape}, the others ask for {asked}")
        if (stated := parts.get("weight_shape")) is not None:
            said = stated[:].flatten().tolist()
            if said != list(self.shape):
                asked = f"{form.codes} has {list(self.shape)}"
                raise ValueError(f"{where}.weight_shape says {said}, {asked}")
        groups = shapes[scales][form.method == "compressed-tensors"]
        if (zeros := parts.get("weight_zero_point")) is not None:
            n = -(-self.shape[0] // self._per_word) if zeros.get_dtype() == "I32" else self.shape[0]
            if (shape := zeros.get_shape()) != [n, groups]:
                asked = f"the others ask for {[n, groups]}"
                raise ValueError(f"{where}.weight_zero_point has shape {shape}, {asked}")
        self.group = self.shape[1] // groups
        stated = [self.shape[1] if size == -1 else size for size in form.groups]
        if self.shape[1] != groups * self.group or self.group not in stated:
            sizes = " or ".join("all inputs" if size == -1 else str(size) for size in form.groups)
            inputs = f"{self.shape[1]} inputs in {groups} groups"
            raise ValueError(f"{where} has {inputs}, but group_size says groups of {sizes}")
        if self.group % 32:
            raise ValueError(f"{where} has groups of {self.group} inputs, not a multiple of 32")
        order = torch.arange(self.shape[1]) // self.group
        if "g_idx" in parts and not torch.equal(parts["g_idx"][:].long(), order):
            raise ValueError(f"{where}.g_idx must be in ascending order: no desc_act (act-order)")

    def get_shape(self) -> tuple[int, int]:
        return self.shape

    def __getitem__(self, slices: tuple[slice, ...]) -> torch.Tensor:
        """Those rows and columns, dequantised to fp32."""
        rows, *others = slices
        return Grouped(*self.grouped(rows)).dequantized()[(slice(None), *others)]

    def grouped(self, rows: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes [n, K] uint8, scales and minimums [n, K / G] fp32 of those rows."""
        start, stop, _ = rows.indices(self.shape[0])
        # Words that hold several rows are read whole.
        words = slice(start // self._per_word, -(-stop // self._per_word))
        low = words.start * self._per_word
        some = slice(low, min(words.stop * self._per_word, self.shape[0]))
        codes, zeros, scales = _READERS[self._form.method](self._form, self._parts, some, words)
        kept, scales = slice(start - low, stop - low), scales.float()
        minimums = -scales * zeros[: len(scales)]
        if not (scales.isfinite().all() and minimums.isfinite().all()):
            name = "weight_scale" if self._form.method == "compressed-tensors" else "scales"
            wrong = scales[~(scales.isfinite() & minimums.isfinite())][0]
            raise ValueError(f"{self._where}.{name} must be finite, got {wrong:g}")
        return codes[kept], scales[kept], minimums[kept]


Shapes = dict[str, list[int]]
Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # codes [n, K], zeros and scales [n, K / G]


def _shapes(form: IntFormat, found: Shapes) -> tuple[tuple[int, int], Shapes]:
    """The shape [N, K] that the codes have, and what follows for the other tensors."""
    per_word = 32 // form.bits
    rows, columns = found[form.codes]
    if form.method == "compressed-tensors":
        n, k = rows, columns * (per_word if form.codes == "weight_packed" else 1)
        groups = found["weight_scale"][-1]
        return (n, k), {"weight_scale": [n, groups]}
    n, k = (columns, rows * per_word) if form.method == "gptq" else (columns * per_word, rows)
    groups = found["scales"][0]
    return (n, k), {"scales": [groups, n], "qzeros": [groups, -(-n // per_word)], "g_idx": [k]}


def _read_gptq(form: IntFormat, parts: Mapping[str, Any], rows: slice, words: slice) -> Part:
    zeros = parts["qzeros"][:, words] + (_ONES[form.bits] if form.zeros_less_one else 0)
    codes = _unpacked(parts["qweight"][:, rows], form.bits, 0)
    return codes.T, _unpacked(zeros, form.bits, 1).T, parts["scales"][:, rows].T


def _read_awq(form: IntFormat, parts: Mapping[str, Any], rows: slice, words: slice) -> Part:
    codes, zeros = (
        _unpacked(parts[part][:, words], 4, 1).unflatten(1, (-1, 8))[..., _AWQ].flatten(1).T
        for part in ("qweight", "qzeros")
    )
    return codes, zeros, parts["scales"][:, rows].T


def _read_compressed(form: IntFormat, parts: Mapping[str, Any], rows: slice, words: slice) -> Part:
    middle = 2 ** (form.bits - 1)  # codes are signed, or packed with this added
    codes, scales = parts[form.codes][rows], parts["weight_scale"][rows]
    codes = _unpacked(codes, form.bits, 1) if codes.dtype == torch.int32 else codes.int() + middle
    if "weight_zero_point" not in parts:
        return codes, torch.tensor(middle).expand(scales.shape), scales
    zeros = parts["weight_zero_point"]
    if zeros.get_dtype() == "I32":
        return codes, _unpacked(zeros[words], form.bits, 0), scales
    return codes, zeros[rows].int() + middle, scales


_READERS = {"gptq": _read_gptq, "awq": _read_awq, "compressed-tensors": _read_compressed}


def _unpacked(words: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """The codes in words of int32 that hold them along `dim`, uint8."""
    parts = [(words >> shift & 2**bits - 1).to(torch.uint8) for shift in range(0, 32, bits)]
    return torch.stack(parts, dim + 1).flatten(dim, dim + 1)
