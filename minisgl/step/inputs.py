"""A `Batch` as arrays: everything the device needs for one step, in one host-to-device copy.

Runs on the planning thread, in numpy. What the host does not know (the last sampled id, positions
behind unread drafts) is filled in on the device by `prepare_inputs`, from per-row state. A step has
one of two layouts: that of a decode graph, where everything but the rows' own facts is constant, or
a ragged one, where sequences have any number of tokens.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from minisgl.core.batch import MAX_CASCADE_GROUPS, PENDING, Batch, Chunk
from minisgl.core.executor import GrammarMasks
from minisgl.step.proposals import (
    number_drafts,
    pack_draft_chunks,
    pack_proposals,
    ragged_sections,
)
from minisgl.step.rows import ADJUSTS, LOGPROBS, PROMPT_LOGPROBS, HostRows, Sections


@dataclass(frozen=True)
class Geometry:
    """What packing must know of the buffers, and to which sizes steps are padded."""

    page_table_width: int  # entries of a row
    padding_row: int
    token_multiple: int = 1  # T and N are padded to half of it or its multiples; 1 = not padded
    # Decode graphs: by tokens per sequence, the numbers of sequences there are graphs for, rising.
    decode_sizes: Mapping[int, Sequence[int]] = field(default_factory=dict)
    staging: int = 0  # int32 words that a step of a decode graph may send
    page_size: int = field(kw_only=True)
    num_drafts: int = 0  # that a draft model proposes for a row, at most
    draft_sizes: Sequence[int] = ()  # numbers of rows that it has graphs for, rising
    piece_sizes: Sequence[int] = ()  # numbers of tokens there are piecewise graphs for, rising

    def graph_for(self, num_sequences: int, width: int) -> tuple[int, int] | None:
        """(size, width) of the smallest graph that holds so many sequences of `width` tokens."""
        for own, sizes in sorted(self.decode_sizes.items()):
            if own >= width and num_sequences <= sizes[-1]:
                return sizes[bisect_left(sizes, num_sequences)], own
        return None


def decode_words(size: int, width: int) -> tuple[int, int, int, int]:
    """Lengths of what a decode graph's step sends first, one after another: token_ids, then rows,
    starts and num_tokens of its sequences."""
    return size * width, size, size, size


def cascade_words(size: int) -> tuple[int, int]:
    """Lengths of what a step with cascade groups sends next: the groups and each sequence's shared
    tokens, as `ForwardInputs` has them."""
    return 3 * MAX_CASCADE_GROUPS, size


@dataclass
class LogprobRequest:
    """Points of one chunk, or its prompt positions, whose log-probabilities are asked for."""

    chunk: int
    first: int  # point, or token of the step
    count: int
    num_top: int


@dataclass
class StepArrays:
    """One packed step. T tokens of S sequences, padding included; M chunks sample at N points."""

    batch: Batch
    sections: Sections
    num_tokens: int  # T
    num_sequences: int  # S
    num_decode: int  # sequences of the decode slice, padding included
    decode_width: int
    max_seqlen_q: int = 1
    replays: bool = False  # whether it is laid out for a decode graph
    in_pieces: bool = False  # or, with T padded, for piecewise graphs
    num_points: int = 0  # N
    max_drafts: int = 0  # K
    num_passes: int = 0  # of the draft model: the most drafts that it proposes for a chunk
    sampling: Sequence[int] = ()  # [M] the chunks that sample
    first_points: Sequence[int] = ()  # [M] the first of each one's points
    adjusts: bool = False  # whether a row that samples has penalties, biases or bans
    logprobs: list[LogprobRequest] = field(default_factory=list)
    prompt_logprobs: list[LogprobRequest] = field(default_factory=list)


def padded_size(count: int, multiple: int) -> int:
    """`count` rounded up to multiple / 2 or to a multiple of `multiple`."""
    if multiple == 1 or count == 0:
        return count
    return multiple // 2 if count <= multiple // 2 else -(-count // multiple) * multiple


def pack_step(batch: Batch, host: HostRows, geometry: Geometry) -> StepArrays:
    """Lay out `batch`; remembers its setups in `host`. ValueError for a batch that is malformed.

    The sections: those of `_pack_decode` or `_pack_ragged`, and of `proposals`; asked [P], points
    whose log-probabilities are asked for, and targets, prompt tokens likewise; copies [J * 3];
    patch_index, patch_page; those of the setups.
    """
    if not batch.chunks:
        raise ValueError(f"batch {batch.step} has no chunks")
    batch, proposing = number_drafts(batch, geometry.num_drafts)
    chunks = batch.chunks
    sections: Sections = host.pack(batch.setups) if batch.setups else {}
    if batch.copies:
        jobs = [(job.source, job.target, job.num_tokens) for job in batch.copies]
        sections["copies"] = np.array(jobs, np.int32).ravel()
    sections |= _pack_patches(chunks, geometry.page_table_width)
    if batch.draft_chunks:
        sections |= pack_draft_chunks(batch.draft_chunks)
    if proposing:
        size = geometry.draft_sizes[bisect_left(geometry.draft_sizes, len(proposing))]
        asked = [chunks[i] for i in proposing]
        sections |= pack_proposals(asked, size, geometry.num_drafts, geometry.padding_row)

    rows = np.array([chunk.row for chunk in chunks], np.int32)
    lengths = np.array([chunk.length for chunk in chunks], np.int32)
    graph, samples = None, [chunk.samples for chunk in chunks]
    if batch.num_decode == len(chunks) and all(samples):
        graph = geometry.graph_for(len(chunks), int(lengths.max()))
        if graph is not None:
            others = sum(map(len, sections.values())) + len(chunks) * graph[1]  # asked, at most
            others += sum(cascade_words(graph[0]))
            if sum(decode_words(*graph)) + others > geometry.staging:
                graph = None
    if graph is None:
        step, offsets = _pack_ragged(batch, rows, lengths, geometry, sections)
    else:
        step, offsets = _pack_decode(batch, rows, lengths, *graph, geometry, sections)
    step.num_passes = max((len(chunks[i].drafts) for i in proposing), default=0)
    _pack_logprobs(step, host, rows, offsets)
    return step


def _pack_decode(
    batch: Batch,
    chunk_rows: np.ndarray,
    lengths: np.ndarray,
    size: int,
    width: int,
    geometry: Geometry,
    others: Sections,
) -> tuple[StepArrays, np.ndarray]:
    """The layout of a decode graph: `size` sequences of `width` tokens, every token a point.

    Sections: decode, the words of `decode_words`; cascade, those of `cascade_words`, where there
    are cascade groups. Also returns where each chunk's tokens begin.
    """
    chunks = batch.chunks
    count = len(chunks)
    packed = np.zeros(sum(decode_words(size, width)), np.int32)
    packed[: count * width], starts = _token_ids(chunks, count, width)
    rows, packed_starts, num_tokens = packed[size * width :].reshape(3, size)
    rows[:count], rows[count:] = chunk_rows, geometry.padding_row
    packed_starts[:count], num_tokens[:count] = starts, lengths
    offsets = np.arange(count, dtype=np.int32) * width
    step = StepArrays(
        batch=batch,
        sections={"decode": packed} | _pack_groups(batch, size, geometry.page_size) | others,
        num_tokens=size * width,
        num_sequences=size,
        num_decode=size,
        decode_width=width,
        replays=True,
        num_points=size * width,
        max_drafts=width - 1,
        sampling=range(count),
        first_points=offsets.tolist(),
    )
    return step, offsets


def _pack_ragged(
    batch: Batch,
    chunk_rows: np.ndarray,
    lengths: np.ndarray,
    geometry: Geometry,
    sections: Sections,
) -> tuple[StepArrays, np.ndarray]:
    """The layout of any other step; decode chunks are padded to the longest of them.

    Sections: those of `ragged_sections`; points [N padded], point_rows [N]; first, sampled_rows
    [M]; drafts [M * K] and point_drafts [N * K] where there are drafts; cascade as in
    `_pack_decode`. Also returns where chunks begin.
    """
    chunks = batch.chunks
    num_decode = batch.num_decode
    width = int(lengths[:num_decode].max()) if num_decode else 1
    widths = lengths.copy()
    widths[:num_decode] = width
    total = int(widths.sum())
    token_ids, starts = _token_ids(chunks, num_decode, width)
    chunk_offsets = np.cumsum(widths, dtype=np.int32) - widths
    rows, own = chunk_rows, lengths
    sizes = geometry.piece_sizes
    in_pieces = bool(sizes) and total <= sizes[-1]
    if in_pieces:
        padding = sizes[bisect_left(sizes, total)] - total
    else:
        padding = padded_size(total, geometry.token_multiple) - total
    if padding:
        # Empty sequences at the end of the decode slice, or one at the very end.
        fits = num_decode > 0 and padding % width == 0 and not in_pieces
        at = num_decode if fits else len(chunks)
        filler = np.full(padding // width if fits else 1, width if fits else padding, np.int32)
        token_ids = np.insert(token_ids, num_decode * width if fits else total, [0] * padding)
        widths, own, rows, starts = (
            np.concatenate([array[:at], fill, array[at:]])
            for array, fill in (
                (widths, filler),
                (own, 0 * filler),
                (rows, 0 * filler + geometry.padding_row),
                (starts, 0 * filler),
            )
        )
        if fits:
            chunk_offsets[num_decode:] += padding
            num_decode += len(filler)
    sections |= ragged_sections(token_ids, widths, rows, starts, own)
    sections |= _pack_groups(batch, num_decode, geometry.page_size)
    step = StepArrays(
        batch=batch,
        sections=sections,
        num_tokens=total + padding,
        num_sequences=len(widths),
        num_decode=num_decode,
        decode_width=width,
        max_seqlen_q=int(widths[num_decode:].max()) if num_decode < len(widths) else 1,
        in_pieces=in_pieces,
    )
    sampling = np.flatnonzero([chunk.samples for chunk in chunks])
    if len(sampling):
        ends = (chunk_offsets + lengths)[sampling]
        _pack_points(step, sampling, chunk_rows[sampling], ends, geometry.token_multiple)
    return step, chunk_offsets


def _token_ids(chunks: list[Chunk], num_decode: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all tokens, decode chunks padded to `width`, and where each chunk starts."""
    starts = np.array([c.start if c.token_ids else PENDING for c in chunks], np.int32)
    if width == 1:
        ids = [c.token_ids[0] if c.token_ids else PENDING for c in chunks[:num_decode]]
    else:
        ids = []
        for chunk in chunks[:num_decode]:
            own = _own_ids(chunk)
            ids += own + [0] * (width - len(own))
    for chunk in chunks[num_decode:]:
        ids += _own_ids(chunk)
    return np.array(ids, np.int32), starts


def _own_ids(chunk: Chunk) -> list[int]:
    ids = chunk.token_ids or [PENDING]
    if chunk.drafts and len(ids) < chunk.length:
        ids = ids + chunk.drafts
    if len(ids) != chunk.length:
        raise ValueError(
            f"chunk of sequence {chunk.uid} has length {chunk.length} but {len(ids)} token ids"
        )
    return ids


def _pack_groups(batch: Batch, size: int, page_size: int) -> Sections:
    """The cascade groups of `size` decode sequences, padding included."""
    if not batch.cascade_groups:
        return {}
    words = np.zeros(sum(cascade_words(size)), np.int32)
    groups, shared = np.split(words, [cascade_words(size)[0]])
    for i, group in enumerate(batch.cascade_groups):
        groups[3 * i : 3 * i + 3] = group.first, group.count, group.num_pages
        shared[group.first : group.first + group.count] = group.num_pages * page_size
    return {"cascade": words}


def _pack_patches(chunks: list[Chunk], page_table_width: int) -> Sections:
    index: list[int] = []
    pages: list[int] = []
    for chunk in chunks:
        if chunk.pages:
            first = chunk.row * page_table_width + chunk.page_index
            if chunk.page_index + len(chunk.pages) > page_table_width:
                raise ValueError(
                    f"sequence {chunk.uid} needs {chunk.page_index + len(chunk.pages)} pages, "
                    f"but a row of the page table has {page_table_width}"
                )
            index.extend(range(first, first + len(chunk.pages)))
            pages.extend(chunk.pages)
    if not pages:
        return {}
    return {"patch_index": np.array(index, np.int32), "patch_page": np.array(pages, np.int32)}


def _pack_points(
    step: StepArrays, sampling: np.ndarray, rows: np.ndarray, ends: np.ndarray, multiple: int
) -> None:
    """Where logits are needed: the last 1 + drafts tokens of every chunk that samples."""
    drafts = [step.batch.chunks[i].drafts for i in sampling.tolist()]
    first = np.arange(len(sampling), dtype=np.int32)
    points, point_rows = ends - 1, rows
    if any(drafts):
        k = np.array([len(d) for d in drafts], np.int32)
        step.max_drafts = width = int(k.max())
        first = (np.cumsum(k + 1) - (k + 1)).astype(np.int32)
        owner = np.repeat(np.arange(len(k)), k + 1)
        nth = np.arange(len(owner)) - first[owner]  # of the owner's points
        points = ends[owner] - (k + 1)[owner] + nth
        point_rows = rows[owner]
        matrix = np.array([d + [PENDING] * (width - len(d)) for d in drafts], np.int32)
        before = np.where(np.arange(width) < nth[:, None], matrix[owner], PENDING)
        step.sections["drafts"] = matrix.ravel()
        step.sections["point_drafts"] = before.astype(np.int32).ravel()
    step.sampling = sampling.tolist()
    step.first_points = first.tolist()
    step.num_points = len(points)
    unused = padded_size(len(points), multiple) - len(points)
    step.sections["points"] = np.append(points, [0] * unused).astype(np.int32)
    step.sections["point_rows"] = point_rows
    step.sections["first"] = first
    step.sections["sampled_rows"] = rows


def _pack_logprobs(
    step: StepArrays, host: HostRows, chunk_rows: np.ndarray, chunk_offsets: np.ndarray
) -> None:
    flags = host.flags[chunk_rows]
    if not flags.any():
        return
    chunks = step.batch.chunks
    for i, first in zip(step.sampling, step.first_points, strict=True):
        step.adjusts |= bool(flags[i] & ADJUSTS)
        if flags[i] & LOGPROBS:
            num_top = host.setups[chunks[i].row].params.logprobs or 0
            step.logprobs.append(LogprobRequest(i, first, 1 + len(chunks[i].drafts), num_top))
    targets: list[int] = []
    for i in np.flatnonzero(flags & PROMPT_LOGPROBS).tolist():
        chunk, setup = chunks[i], host.setups[chunks[i].row]
        end = min(chunk.start + chunk.length, setup.prompt_length - 1)
        num_top = setup.params.prompt_logprobs or 0
        if chunk.start < setup.prompt_length:
            targets += setup.token_ids[chunk.start + 1 : end + 1]
            first = int(chunk_offsets[i])
            step.prompt_logprobs.append(LogprobRequest(i, first, end - chunk.start, num_top))
    if step.logprobs:
        spans = [np.arange(r.first, r.first + r.count, dtype=np.int32) for r in step.logprobs]
        step.sections["asked"] = np.concatenate(spans)
    if step.prompt_logprobs:
        step.sections["targets"] = np.array(targets, np.int32)


def pack_masks(step: StepArrays, masks: GrammarMasks, places: int) -> np.ndarray:
    """`places` indices, -1 after the masks' own points, then the masks' bits: int32 words.

    A chunk's masks are for its points, in order.
    """
    count, words = masks.bits.shape
    packed = np.empty(places + count * words, np.int32)
    next_point = dict(zip(step.sampling, step.first_points, strict=True))
    for i, chunk in enumerate(masks.indices):
        packed[i] = next_point[chunk]
        next_point[chunk] += 1
    packed[count:places] = -1
    packed[places:] = np.ascontiguousarray(masks.bits).view(np.int32).ravel()
    return packed


def join(sections: Sections) -> np.ndarray:
    """The sections one after another, int32."""
    return np.concatenate(list(sections.values()))


def split(sections: Sections, sent: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of the uploaded `join(sections)`, by name."""
    sizes = [len(section) for section in sections.values()]
    parts = sent.split(sizes)  # type: ignore[no-untyped-call]
    return dict(zip(sections, parts, strict=True))
