"""The header of a GGUF file: every size, count and offset is checked before it is used.

The layout is that of ggml's docs/gguf.md: metadata by key, then name, shape, type and place of each
tensor, then the tensors' bytes.
"""

import math
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

VERSIONS = (2, 3)
MAX_HEADER = 2**26  # bytes: metadata with a vocabulary of 262,144 tokens has less than 2**24
MAX_STRINGS = 2**21  # of all arrays of a file
MAX_NAME = 2**10  # bytes of a key or a tensor's name
MAX_DIMS = 4
MAX_ALIGNMENT = 2**16
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 10: "Q", 11: "q", 12: "d"}
_BOOLEAN, _STRING, _ARRAY = 7, 8, 9
_SHORT = reprlib.Repr()
_SHORT.maxlist, _SHORT.maxtuple, _SHORT.maxstring, _SHORT.maxother = 8, 8, 200, 200


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is. `shape` [rows..., columns] has the outermost dimension first."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int  # byte of the file

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, which is a whole number of blocks."""
        elements, size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // elements * size

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class Gguf:
    """Metadata and tensors of one file.

    Values are int, float, bool, str, a list of str, or an array of numbers. The readers raise
    ValueError naming file, key, limit and value.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def bad(self, key: str, wanted: str, got: object) -> ValueError:
        return ValueError(f"{self.path}: {key} must be {wanted}, got {shown(got)}")

    def scalar(self, key: str) -> Any:
        """What is no array, or None where there is none."""
        value = self.metadata.get(key)
        if isinstance(value, list | np.ndarray):
            raise self.bad(key, "one value", value)
        return value

    def integer(self, key: str, most: int, default: int | None = None) -> int | None:
        """An integer of 0 to `most`, or the default where there is none."""
        value = self.metadata.get(key, default)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value <= most:
            raise self.bad(key, f"an integer of 0 to {most}", value)
        return value

    def boolean(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if type(value) is not bool:
            raise self.bad(key, "true or false", value)
        return value

    def text(self, key: str, default: str | None = None) -> str | None:
        value = self.metadata.get(key, default)
        if not isinstance(value, str | None):
            raise self.bad(key, "a string", value)
        return value

    def texts(self, key: str) -> list[str]:
        value = self.metadata.get(key)
        if not isinstance(value, list):
            raise self.bad(key, "an array of strings", value)
        return value

    def numbers(self, key: str, length: int) -> np.ndarray:
        """An array of so many finite numbers."""
        value = self.metadata.get(key)
        if not isinstance(value, np.ndarray) or len(value) != length:
            raise self.bad(key, f"an array of {length} numbers", value)
        if not np.isfinite(value).all():
            raise self.bad(key, "finite", value)
        return value


def shown(value: object) -> str:
    """As errors show it: of long strings and arrays a part."""
    return _SHORT.repr(value[:9].tolist() if isinstance(value, np.ndarray) else value)


def read_gguf(path: Path) -> Gguf:
    """Read the header of a file of version 2 or 3, little-endian.

    Raises ValueError that names what is wrong, or what is not supported: a type of tensors, a file
    that is one of several. Reads at most `MAX_HEADER` bytes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            cursor = _Cursor(path, size, file.read(MAX_HEADER))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if cursor.take(4, "the magic number") != b"GGUF":
        raise ValueError(f"{path} is no GGUF file: it does not begin with GGUF")
    version = cursor.number("I", "the version")
    if version not in VERSIONS:
        raise cursor.bad(f"the version must be one of {VERSIONS}, little-endian, got {version}")
    num_tensors, num_keys = (cursor.count(f"the number of {w}") for w in ("tensors", "keys"))
    metadata: dict[str, Any] = {}
    for index in range(num_keys):
        key = cursor.text(f"the name of key {index}", MAX_NAME)
        if key in metadata:
            raise cursor.bad(f"key {key} is there twice")
        metadata[key] = cursor.value(cursor.number("I", f"the type of {key}"), key)
    parts = metadata.get("split.count", 1)
    if type(parts) is not int or parts not in (0, 1):  # 0: merged from several
        how = "merge the parts of a model into one file first (gguf-split --merge)"
        raise cursor.bad(f"split.count must be 0 or 1, got {shown(parts)}; {how}")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= MAX_ALIGNMENT or alignment % 8:
        wanted = f"a multiple of 8 of at most {MAX_ALIGNMENT}"
        raise cursor.bad(f"general.alignment must be {wanted}, got {shown(alignment)}")
    infos = [_read_info(cursor, index) for index in range(num_tensors)]
    return Gguf(path, metadata, _placed(cursor, infos, alignment))


@dataclass
class _Cursor:
    """Reads `data`, the beginning of a file of `size` bytes. Every error names the file."""

    path: Path
    size: int
    data: bytes
    at: int = 0
    strings: int = 0

    def bad(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what}")

    def take(self, count: int, what: str) -> bytes:
        left = len(self.data) - self.at
        if count > left:
            end = "the file" if len(self.data) == self.size else f"the {MAX_HEADER} bytes"
            raise self.bad(f"{what} takes {count} bytes, but {end} of a header ends after {left}")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str, what: str) -> Any:
        (value,) = struct.unpack(f"<{kind}", self.take(struct.calcsize(kind), what))
        return value

    def count(self, what: str) -> int:
        """Of things that take a byte or more each."""
        value: int = self.number("Q", what)
        if value > (left := len(self.data) - self.at):
            raise self.bad(f"{what} is {value}, but the header has {left} bytes left")
        return value

    def text(self, what: str, most: int = MAX_HEADER) -> str:
        length = self.number("Q", what)
        if length > most:
            raise self.bad(f"{what} must have at most {most} bytes, got {length}")
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError as error:
            raise self.bad(f"{what} is no UTF-8: {error}") from error

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text(key)
        if kind == _BOOLEAN:
            if (value := self.number("B", key)) > 1:
                raise self.bad(f"{key} must be 0 or 1 as a boolean, got {value}")
            return bool(value)
        if kind == _ARRAY:
            return self.array(self.number("I", f"the element type of {key}"), key)
        if kind not in _NUMBERS:
            raise self.bad(f"{key} has the unknown type {kind}")
        value = self.number(_NUMBERS[kind], key)
        if not math.isfinite(value):
            raise self.bad(f"{key} must be finite, got {value}")
        return value

    def array(self, kind: int, key: str) -> list[str] | np.ndarray:
        count = self.count(f"the length of {key}")
        if kind == _STRING:
            self.strings += count
            if self.strings > MAX_STRINGS:
                raise self.bad(f"{key}: arrays may have {MAX_STRINGS} strings, got {self.strings}")
            return [self.text(key) for _ in range(count)]
        if kind not in _NUMBERS and kind != _BOOLEAN:
            raise self.bad(f"{key} is an array of the type {kind}, which is not read")
        dtype = np.dtype(_NUMBERS.get(kind, "?")).newbyteorder("<")
        return np.frombuffer(self.take(count * dtype.itemsize, key), dtype)


def _read_info(cursor: _Cursor, index: int) -> TensorInfo:
    """One tensor, its place still counted from where the tensors begin."""
    name = cursor.text(f"the name of tensor {index}", MAX_NAME)
    dims = cursor.number("I", f"the dimensions of {name}")
    if not 1 <= dims <= MAX_DIMS:
        raise cursor.bad(f"tensor {name} must have 1 to {MAX_DIMS} dimensions, got {dims}")
    sizes = [cursor.number("Q", f"the shape of {name}") for _ in range(dims)]
    kind, offset = cursor.number("I", f"the type of {name}"), cursor.number("Q", name)
    try:
        type_ = GGMLQuantizationType(kind)
    except ValueError:
        type_ = None
    if type_ is None or type_.name not in TYPES:
        found = f"number {kind}" if type_ is None else type_.name
        raise cursor.bad(f"tensor {name} has the type {found}; read are {', '.join(TYPES)}")
    info = TensorInfo(name, type_, tuple(sizes[::-1]), offset)
    block = GGML_QUANT_SIZES[type_][0]
    if 0 in sizes or sizes[0] % block:
        wanted = f"sizes above 0, the last a multiple of {block} ({type_.name})"
        raise cursor.bad(f"tensor {name} must have {wanted}, got {info.shape}")
    return info


def _placed(cursor: _Cursor, infos: list[TensorInfo], alignment: int) -> dict[str, TensorInfo]:
    """The tensors where they are in the file, in which they must lie one behind another."""
    end = begin = -(-cursor.at // alignment) * alignment
    placed: dict[str, TensorInfo] = {}
    for info in sorted(infos, key=lambda info: info.start):
        start, last = begin + info.start, end
        end = start + info.rows * info.row_bytes
        if info.start % alignment or start < last or end > cursor.size:
            place = f"takes bytes {start} to {end}, after others that end at {last}"
            limit = f"the file has {cursor.size}, and tensors begin at multiples of {alignment}"
            raise cursor.bad(f"tensor {info.name} {place}; {limit}")
        if info.name in placed:
            raise cursor.bad(f"tensor {info.name} is there twice")
        placed[info.name] = replace(info, start=start)
    return placed
