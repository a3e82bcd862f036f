"""Self-attention over paged KV, and `ForwardInputs`, a `Batch` as tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from minisgl.kernels.attention.paged import PagedKV
from minisgl.kernels.cascade import cascade
from minisgl.kernels.decode import decode
from minisgl.kernels.op import Op
from minisgl.kernels.qkv_prepare import qkv_prepare
from minisgl.layers.linear import ColumnLinear, RowLinear
from minisgl.layers.norm import RMSNorm
from minisgl.layers.weights import Block

KV = tuple[torch.Tensor, torch.Tensor]  # a layer's pools of keys and values [slots, Hkv, D]
# (layer, x, inputs, kv) -> [T, Hq, D]: queries and attention, in place of the layer's own.
Attend = Callable[["Attention", torch.Tensor, "ForwardInputs", KV], torch.Tensor]


@dataclass(frozen=True, slots=True)
class ForwardInputs:
    """One step's tensors. T tokens of S sequences; the decode ones come first.

    A sequence's KV of position p lies in slot `page_table[row, p // page_size] * page_size +
    p % page_size` of every layer. The page table is indexed by row and never gathered.
    """

    input_ids: torch.Tensor  # [T] int32
    positions: torch.Tensor  # [T] int64
    cu_seqlens_q: torch.Tensor  # [S + 1] int32, token offsets of the sequences
    seq_lens: torch.Tensor  # [S] int32, KV length including this step's tokens; 0 = padding
    rows: torch.Tensor  # [S] int32, each sequence's row of the page table
    page_table: torch.Tensor  # [max_rows, max_pages] int32
    slot_mapping: torch.Tensor  # [T] int64, where this step's KV is written
    kv: Sequence[KV]  # per layer
    page_size: int
    num_decode: int  # the first num_decode sequences have decode_width tokens each
    decode_width: int = 1
    max_seqlen_q: int = 1  # over the sequences that are not decode
    # Decode sequences that begin with the same pages, as `kernels.cascade` has them; None: no such.
    groups: torch.Tensor | None = None  # [G, 3] int32
    shared: torch.Tensor | None = None  # [num_decode] int32
    attend: Attend | None = None  # of a pass that is captured in pieces, see `step.piecewise`


@dataclass(frozen=True, slots=True)
class AttentionSlices:
    """A step's decode part and its chunk part, the same for every layer."""

    decode_tokens: int
    decode_rows: torch.Tensor
    decode_lens: torch.Tensor
    chunk_rows: torch.Tensor
    chunk_lens: torch.Tensor
    chunk_offsets: torch.Tensor  # cu_seqlens_q of the chunk part alone

    @classmethod
    def of(cls, inputs: ForwardInputs) -> "AttentionSlices":
        n = inputs.num_decode
        tokens, offsets = n * inputs.decode_width, inputs.cu_seqlens_q[n:]
        return cls(
            decode_tokens=tokens,
            decode_rows=inputs.rows[:n],
            decode_lens=inputs.seq_lens[:n],
            chunk_rows=inputs.rows[n:],
            chunk_lens=inputs.seq_lens[n:],
            chunk_offsets=offsets - tokens if tokens and len(offsets) > 1 else offsets,
        )


@dataclass(eq=False)
class Attention(Block):
    """Self-attention over the paged KV of one layer: project, prepare, attend, project."""

    qkv: ColumnLinear
    out: RowLinear
    qk_norm: tuple[RMSNorm, RMSNorm] | None
    cos_sin: torch.Tensor  # the rotary table, shared by layers with the same `Rope`
    scale: float
    window: int | None
    softcap: float | None
    attention: Op  # of prompts

    def __post_init__(self) -> None:
        self.num_heads, self.num_kv_heads, _ = (count for _, count in self.qkv.shares)

    def __call__(
        self, x: torch.Tensor, inputs: ForwardInputs, slices: AttentionSlices, kv: KV
    ) -> torch.Tensor:
        """x: [T, hidden]; kv: this layer's pools. Returns this rank's part of [T, hidden]."""
        if inputs.attend is None:
            attended = self.attend(self.queries_writing_kv(x, inputs, kv), kv, inputs, slices)
        else:
            attended = inputs.attend(self, x, inputs, kv)
        return self.out(attended.flatten(1))

    def queries_writing_kv(
        self, x: torch.Tensor, inputs: ForwardInputs, kv: KV, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Queries [T, Hq, D] of x, in `out` if that is given; writes keys and values to `kv`."""
        q_weight, k_weight, eps, unit_offset = None, None, 0.0, False
        if self.qk_norm is not None:
            q_norm, k_norm = self.qk_norm
            q_weight, k_weight = q_norm.weight, k_norm.weight
            eps, unit_offset = q_norm.eps, q_norm.unit_offset
        return qkv_prepare(
            self.qkv(x),
            inputs.positions,
            self.cos_sin,
            *kv,
            inputs.slot_mapping,
            self.num_heads,
            q_weight,
            k_weight,
            eps,
            unit_offset,
            out=out,
        )

    def attend(
        self,
        q: torch.Tensor,
        kv: KV,
        inputs: ForwardInputs,
        slices: AttentionSlices,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What queries [T, Hq, D] make of `kv`, in `out` if that is given."""
        n = slices.decode_tokens
        if 0 < n == q.shape[0]:
            return self._decode(q, kv, inputs, slices, out)
        attended = torch.empty_like(q) if out is None else out
        if n:
            self._decode(q[:n], kv, inputs, slices, attended[:n])
        if slices.chunk_rows.shape[0]:
            self.attention(
                q[n:],
                self._paged(kv, inputs, slices.chunk_rows, slices.chunk_lens),
                slices.chunk_offsets,
                max_seqlen_q=inputs.max_seqlen_q,
                out=attended[n:],
            )
        return attended

    def _decode(
        self,
        q: torch.Tensor,
        kv: KV,
        inputs: ForwardInputs,
        slices: AttentionSlices,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        """The same for a step's decode part alone."""
        paged = self._paged(kv, inputs, slices.decode_rows, slices.decode_lens)
        # Sequences share their beginning, which a window leaves out.
        if inputs.groups is None or self.window is not None:
            return decode(q, paged, width=inputs.decode_width, out=out)  # type: ignore[no-any-return]
        groups, width = (inputs.groups, inputs.shared), inputs.decode_width
        return cascade(q, paged, *groups, width=width, out=out)  # type: ignore[no-any-return]

    def _paged(
        self, kv: KV, inputs: ForwardInputs, rows: torch.Tensor, seq_lens: torch.Tensor
    ) -> PagedKV:
        """This layer's keys and values for the sequences of some of a step's rows."""
        return PagedKV(
            *kv,
            inputs.page_table,
            rows,
            seq_lens,
            inputs.page_size,
            self.scale,
            self.window,
            self.softcap,
        )
