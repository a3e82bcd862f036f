"""The tensors of a GGUF file by the names and in the layout of the Llama convention.

They are read from the file by rows, in whole blocks, and dequantised to fp32 or taken apart into
codes as they are asked for.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from gguf import dequantize

from minisgl.gguf import blocks
from minisgl.gguf.header import Gguf, TensorInfo

MAX_EXPERTS = 2**10
LLAMA3_FACTORS = "rope_freqs.weight"
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
# Parts of "blk.N.": what they are in "model.layers.N.".
_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Those of all experts in one tensor [experts, rows, columns].
_EXPERTS = {f"ffn_{part}_exps": f"{part}_proj" for part in ("gate", "up", "down")}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


class GgufWeights:
    """Read like an open safetensors file; opening it takes nothing that closing gives back.

    heads: query and key heads of a model whose rotated pairs lie side by side in the file, as
    llama's do; None where they lie half a head apart, as here.
    """

    def __init__(self, file: Gguf, heads: tuple[int, int] | None, gemma: bool) -> None:
        self.name = file.path.name
        self._slices: dict[str, GgufSlice] = {}
        for info in file.tensors.values():
            if info.name == LLAMA3_FACTORS and heads is not None:  # part of the config
                continue
            unit_offset = gemma and info.name.endswith("norm.weight")
            for name, first, shape in _parts(file, info, gemma):
                paired = 0
                if heads is not None and ".self_attn.q_proj." in name:
                    paired = heads[0]
                elif heads is not None and ".self_attn.k_proj." in name:
                    paired = heads[1]
                if name in self._slices:
                    raise ValueError(f"{file.path}: {info.name} is {name}, which is there twice")
                self._slices[name] = GgufSlice(file, info, first, shape, paired, unit_offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        pass

    def keys(self) -> list[str]:
        return list(self._slices)

    def get_slice(self, name: str) -> "GgufSlice":
        return self._slices[name]


@dataclass(frozen=True)
class GgufSlice:
    """One matrix or vector, or one expert's of several, of which parts can be taken."""

    file: Gguf
    info: TensorInfo
    first: int  # row of the tensor that is this one's first
    shape: tuple[int, ...]
    paired: int = 0  # heads whose rows lie in pairs that are rotated together
    unit_offset: bool = False  # the file has one plus the weight

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    @property
    def group(self) -> int | None:
        """Weights that share a scale; None where it is stored in floats."""
        return blocks.GROUP if blocks.is_quantised(self.info.type) else None

    def grouped(self, rows: slice) -> blocks.Groups:
        """Codes [n, K], scales and minimums [n, K / group] of those rows of a quantised matrix."""
        wanted = self._order()[rows]
        low = int(wanted.min())
        stored = self.blocks(low, int(wanted.max()) + 1)
        codes, scales, minimums = blocks.grouped(stored, self.info.type)
        return codes[wanted - low], scales[wanted - low], minimums[wanted - low]

    def __getitem__(self, slices: tuple[slice, ...]) -> np.ndarray:
        """Those rows, one or more, and columns of a matrix, dequantised to fp32."""
        wanted = self._order()[slices[0]]
        found: np.ndarray
        if len(self.shape) == 1:
            found = self._dequantised(0, 1)[0, wanted]
        else:
            low = int(wanted.min())
            rows = self._dequantised(low, int(wanted.max()) + 1)[wanted - low]
            found = rows[(slice(None), *slices[1:])]
        return found - np.float32(1.0) if self.unit_offset else found

    def blocks(self, first: int, stop: int) -> np.ndarray:
        """Rows of the file as they are stored, uint8 [rows, bytes of a row].

        Raises ValueError where the file has become shorter, or a scale is not finite.
        """
        size, start = (
            self.info.row_bytes,
            self.info.start + (self.first + first) * self.info.row_bytes,
        )
        count = (stop - first) * size
        found = np.fromfile(self.file.path, np.uint8, count, offset=start)
        if len(found) != count:
            raise ValueError(f"{self.file.path} has become shorter: {self.info.name} is cut off")
        rows = found.reshape(-1, size)
        if (wrong := blocks.first_infinite(rows, self.info.type)) is not None:
            row, block, value = wrong
            where = f"block {block} of row {self.first + first + row}"
            raise ValueError(
                f"{self.file.path}: {self.info.name} has a scale or minimum of {value:g} in {where}"
            )
        return rows

    def _dequantised(self, first: int, stop: int) -> np.ndarray:
        return dequantize(self.blocks(first, stop), self.info.type)

    def _order(self) -> np.ndarray:
        """Which row of the file each row is."""
        order = np.arange(self.shape[0])
        return order.reshape(self.paired, -1, 2).swapaxes(1, 2).ravel() if self.paired else order


def _parts(file: Gguf, info: TensorInfo, gemma: bool) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """Name, first row and shape of what a tensor holds; its own name where it is not known."""
    stem, _, kind = info.name.rpartition(".")
    block = _BLOCK.fullmatch(info.name)
    if block is None:
        yield f"{_TOP[stem]}.{kind}" if stem in _TOP else info.name, 0, info.shape
        return
    layer, part, kind = block.groups()
    prefix, names = f"model.layers.{layer}", _PARTS | _GEMMA if gemma else _PARTS
    if part in _EXPERTS and len(info.shape) == 3:
        experts, rows, columns = info.shape
        if experts > MAX_EXPERTS:
            raise file.bad(info.name, f"of at most {MAX_EXPERTS} experts", experts)
        for expert in range(experts):
            name = f"{prefix}.mlp.experts.{expert}.{_EXPERTS[part]}.{kind}"
            yield name, expert * rows, (rows, columns)
    elif part in names:
        yield f"{prefix}.{names[part]}.{kind}", 0, info.shape
    else:
        yield info.name, 0, info.shape
