"""What a step asks of the draft model, packed: tokens whose KV it lacks, and rows to propose for.

A draft that the device will propose travels as `DRAFTED - n`, n being its place among the step's
proposals [D, K], until `resolve` puts the token there.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from minisgl.core.batch import PENDING, Batch, Chunk
from minisgl.step.rows import Sections

DRAFTED = -2
RAGGED = ("token_ids", "sequences", "offsets", "rows", "starts", "num_tokens")
FILL = "fill_"  # before the names of what the draft model alone computes


def is_proposed(chunk: Chunk) -> bool:
    """Whether the draft model names the chunk's drafts."""
    return bool(chunk.drafts) and chunk.drafts[0] == PENDING


def number_drafts(batch: Batch, num_drafts: int) -> tuple[Batch, list[int]]:
    """The batch with its pending drafts numbered, and which chunks have them.

    ValueError where a chunk has more than the `num_drafts` that the draft model proposes.
    """
    proposing = [i for i, c in enumerate(batch.chunks) if c.drafts and is_proposed(c)]
    if not proposing:
        return batch, proposing
    chunks = list(batch.chunks)
    for n, i in enumerate(proposing):
        count, first = len(chunks[i].drafts), DRAFTED - n * num_drafts
        if count > num_drafts:
            raise ValueError(
                f"sequence {chunks[i].uid} has {count} drafts, but there are at most {num_drafts}"
            )
        numbers = list(range(first, first - count, -1))
        chunks[i] = msgspec.structs.replace(chunks[i], drafts=numbers)
    return msgspec.structs.replace(batch, chunks=chunks), proposing


def pack_proposals(chunks: list[Chunk], size: int, num_drafts: int, padding_row: int) -> Sections:
    """Section propose: `size` rows, padding included, then [K, size] tokens of each row's own.

    The first pass takes a row's last two tokens, each later one the draft before.
    """
    packed = np.zeros((1 + num_drafts, size), np.int32)
    rows, counts = packed[0], packed[1:]
    rows[:] = padding_row
    rows[: len(chunks)] = [chunk.row for chunk in chunks]
    wanted = np.array([len(chunk.drafts) for chunk in chunks])
    counts[:, : len(chunks)] = np.arange(num_drafts)[:, None] < wanted
    counts[0] *= 2
    return {"propose": packed.ravel()}


def pack_draft_chunks(chunks: list[Chunk]) -> Sections:
    """The sections of a ragged pass over these chunks, named FILL + ..."""
    lengths = np.array([chunk.length for chunk in chunks], np.int32)
    ids = np.array([token for chunk in chunks for token in chunk.token_ids], np.int32)
    rows = np.array([chunk.row for chunk in chunks], np.int32)
    starts = np.array([chunk.start for chunk in chunks], np.int32)
    sections = ragged_sections(ids, lengths, rows, starts, lengths)
    return {FILL + name: section for name, section in sections.items()}


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


def resolve(ids: torch.Tensor, drafted: torch.Tensor) -> None:
    """Replace numbered drafts in `ids` int32 by their tokens in `drafted` [D, K], in place."""
    places = (DRAFTED - ids).clamp_(min=0, max=drafted.numel() - 1)
    tokens = drafted.view(-1).index_select(0, places.view(-1)).view_as(ids)
    ids.copy_(torch.where(ids <= DRAFTED, tokens, ids))


def read_drafts(batch: Batch, drafted: Sequence[Sequence[int]]) -> list[list[int]]:
    """Every chunk's drafts, with those of a batch that `number_drafts` numbered read from the
    proposals [D][K]."""
    proposals = iter(drafted)
    return [
        list(next(proposals)[: len(chunk.drafts)])
        if chunk.drafts and chunk.drafts[0] <= DRAFTED
        else chunk.drafts
        for chunk in batch.chunks
    ]
