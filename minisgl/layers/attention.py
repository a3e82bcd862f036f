"""`ForwardInputs`: a `Batch` as tensors, the one argument of every forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


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
    kv: Sequence[tuple[torch.Tensor, torch.Tensor]]  # per layer: K and V [slots, Hkv, D]
    page_size: int
    num_decode: int  # the first num_decode sequences have decode_width tokens each
    decode_width: int = 1
    max_seqlen_q: int = 1  # over the sequences that are not decode
