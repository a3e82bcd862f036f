"""A forward pass over sequences of any lengths: what is sent for it, and its inputs."""

from collections.abc import Sequence

import numpy as np
import torch

from minisgl.device import Device
from minisgl.kernels.advance import prepare_inputs
from minisgl.layers.attention import ForwardInputs
from minisgl.step.kv_pool import KVPool
from minisgl.step.rows import RowBuffers, Sections

RAGGED = ("token_ids", "sequences", "offsets", "rows", "starts", "num_tokens")


def ragged_sections(
    token_ids: np.ndarray,
    widths: np.ndarray,
    rows: np.ndarray,
    starts: np.ndarray,
    num_tokens: np.ndarray,
) -> Sections:
    """What a ragged forward pass over sequences of `widths` tokens needs, by the names in RAGGED:
    token_ids, sequences [T]; offsets [S + 1]; rows, starts, num_tokens [S]."""
    offsets = np.zeros(len(widths) + 1, np.int32)
    np.cumsum(widths, out=offsets[1:])
    sequences = np.repeat(np.arange(len(widths), dtype=np.int32), widths)
    parts = (token_ids, sequences, offsets, rows, starts, num_tokens)
    return dict(zip(RAGGED, parts, strict=True))


def equal_sequences(device: Device, most: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences [most * width] and offsets [most + 1] of sequences of `width` tokens each."""
    # Made on the host: where there is no memory, PyTorch would load its compiler for an arange.
    every = np.arange(most + 1, dtype=np.int32)
    sequences = device.zeros((most * width,), torch.int32)
    offsets = device.zeros((most + 1,), torch.int32)
    device.upload(every[:-1].repeat(width), sequences)
    return sequences, device.upload(every * width, offsets)


def ragged_inputs(
    rows: RowBuffers,
    pool: KVPool,
    token_ids: torch.Tensor,
    sequences: torch.Tensor,
    offsets: torch.Tensor,
    own: torch.Tensor,
    starts: torch.Tensor,
    num_tokens: torch.Tensor,
    *,
    num_decode: int = 0,
    decode_width: int = 1,
    max_seqlen_q: int = 1,
    groups: torch.Tensor | None = None,
    shared: torch.Tensor | None = None,
    tokens: Sequence[torch.Tensor] | None = None,
) -> ForwardInputs:
    """For T tokens of the S sequences in rows `own`; tensors are `prepare_inputs`'s, the rest is
    `ForwardInputs`'s. tokens: where input_ids, positions and slot_mapping are to be, if not in
    memory of their own."""
    if tokens is None:
        positions = torch.empty_like(token_ids, dtype=torch.int64)
        tokens = torch.empty_like(token_ids), positions, torch.empty_like(positions)
    input_ids, positions, slot_mapping = tokens
    inputs = ForwardInputs(
        input_ids=input_ids,
        positions=positions,
        cu_seqlens_q=offsets,
        seq_lens=torch.empty_like(starts),
        rows=own,
        page_table=rows.page_table,
        slot_mapping=slot_mapping,
        kv=pool.layers,
        page_size=pool.page_size,
        num_decode=num_decode,
        decode_width=decode_width,
        max_seqlen_q=max_seqlen_q,
        groups=groups,
        shared=shared,
    )
    fill_inputs(inputs, rows, token_ids, sequences, starts, num_tokens)
    return inputs


def fill_inputs(
    inputs: ForwardInputs,
    rows: RowBuffers,
    token_ids: torch.Tensor,
    sequences: torch.Tensor,
    starts: torch.Tensor,
    num_tokens: torch.Tensor,
) -> None:
    """`prepare_inputs` into `inputs`, whose rows and offsets are given."""
    prepare_inputs(
        inputs.input_ids,
        inputs.positions,
        inputs.slot_mapping,
        inputs.seq_lens,
        token_ids,
        sequences,
        inputs.cu_seqlens_q,
        inputs.rows,
        starts,
        num_tokens,
        rows.last,
        rows.lengths,
        rows.page_table,
        inputs.page_size,
    )
