"""What a step asks of the draft model, packed: tokens whose KV it lacks, and rows to propose for.

A draft that the device will propose travels as `DRAFTED - n`, n being its place among the step's
proposals [D, K], until `resolve` puts the token there.
"""

from bisect import bisect_left
from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from minisgl.core.batch import PENDING, Batch
from minisgl.step.ragged import ragged_sections
from minisgl.step.rows import Sections
from minisgl.step.sizes import Geometry

DRAFTED = -2
FILL = "fill_"  # before the names of what the draft model alone computes


def number_drafts(batch: Batch, num_drafts: int) -> Batch:
    """The batch with its pending drafts numbered, by which they are known from then on.

    ValueError where a chunk has more than the `num_drafts` that the draft model proposes.
    """
    pending = [i for i, c in enumerate(batch.chunks) if c.drafts and c.drafts[0] == PENDING]
    if not pending:
        return batch
    chunks = list(batch.chunks)
    for n, i in enumerate(pending):
        count, first = len(chunks[i].drafts), DRAFTED - n * num_drafts
        if count > num_drafts:
            raise ValueError(
                f"sequence {chunks[i].uid} has {count} drafts, but there are at most {num_drafts}"
            )
        numbers = list(range(first, first - count, -1))
        chunks[i] = msgspec.structs.replace(chunks[i], drafts=numbers)
    return msgspec.structs.replace(batch, chunks=chunks)


def pack_drafts(batch: Batch, geometry: Geometry) -> tuple[Sections, int]:
    """What the draft model computes and proposes before the target's pass, and in how many passes.

    Sections: those of `ragged_sections` over the draft chunks, named FILL + ...; propose, a row
    for each chunk with numbered drafts, padding included, then [K, size] tokens of each row's own.
    The first pass takes a row's last two tokens, each later one the draft before.
    """
    sections: Sections = {}
    if chunks := batch.draft_chunks:
        lengths = np.array([chunk.length for chunk in chunks], np.int32)
        ids = np.array([token for chunk in chunks for token in chunk.token_ids], np.int32)
        rows = np.array([chunk.row for chunk in chunks], np.int32)
        starts = np.array([chunk.start for chunk in chunks], np.int32)
        parts = ragged_sections(ids, lengths, rows, starts, lengths)
        sections |= {FILL + name: section for name, section in parts.items()}
    asking = [chunk for chunk in batch.chunks if chunk.drafts and chunk.drafts[0] <= DRAFTED]
    if not asking:
        return sections, 0
    size = geometry.draft_sizes[bisect_left(geometry.draft_sizes, len(asking))]
    packed = np.zeros((1 + geometry.num_drafts, size), np.int32)
    rows, counts = packed[0], packed[1:]
    rows[: len(asking)], rows[len(asking) :] = [chunk.row for chunk in asking], geometry.padding_row
    wanted = np.array([len(chunk.drafts) for chunk in asking])
    counts[:, : len(asking)] = np.arange(geometry.num_drafts)[:, None] < wanted
    counts[0] *= 2
    sections["propose"] = packed.ravel()
    return sections, int(wanted.max())


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
