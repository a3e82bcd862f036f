"""A `Batch` becomes a `PackedBatch`: all that a step needs, in one host-to-device copy.

Runs on the planning thread, in numpy. What the host does not know (the last sampled id, positions
behind unread drafts) is filled in on the device by `prepare_inputs`, from per-row state. A step has
one of two layouts: that of a decode graph, where all but the rows' own numbers is constant, or a
ragged one, where sequences have any number of tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from minisgl.core.batch import PENDING, Batch, Chunk
from minisgl.core.executor import GrammarMasks
from minisgl.step.proposals import number_drafts, pack_drafts
from minisgl.step.ragged import ragged_sections
from minisgl.step.rows import ADJUSTS, LOGPROBS, PROMPT_LOGPROBS, HostRows, Sections
from minisgl.step.sizes import Geometry, cascade_words, padded_size


@dataclass
class LogprobRequest:
    """Points of one chunk, or its prompt positions, whose log-probabilities are asked for."""

    chunk: int
    first: int  # point, or token of the step
    count: int
    num_top: int


@dataclass
class PackedBatch:
    """A batch as arrays. T tokens of S sequences, padding included; M chunks sample at N points."""

    batch: Batch
    sections: Sections
    offsets: Sequence[int]  # where each chunk's tokens begin
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


def pack_step(batch: Batch, host: HostRows, geometry: Geometry) -> PackedBatch:
    """Lay out `batch`; remembers its setups in `host`. ValueError for a batch that is malformed.

    The sections: those of the layout; asked [P], points whose log-probabilities are asked for, and
    targets, prompt tokens likewise; those of the setups; copies [J * 3]; patch_index, patch_page;
    and what the draft model is asked for.
    """
    if not batch.chunks:
        raise ValueError(f"batch {batch.step} has no chunks")
    batch = number_drafts(batch, geometry.num_drafts)
    graph = None
    if batch.num_decode == len(batch.chunks) and all(chunk.samples for chunk in batch.chunks):
        longest = max(chunk.length for chunk in batch.chunks)
        graph = geometry.graph_for(len(batch.chunks), longest)
    step = _pack(batch, graph, host, geometry)
    if step.replays and sum(map(len, step.sections.values())) > geometry.staging:
        step = _pack(batch, None, host, geometry)
    return step


def _pack(
    batch: Batch, graph: tuple[int, int] | None, host: HostRows, geometry: Geometry
) -> PackedBatch:
    """The step in the layout of the decode graph (size, width), or else a ragged one."""
    if graph is None:
        step = _lay_out_ragged(batch, geometry)
    else:
        step = _lay_out_decode(batch, *graph, geometry)
    if batch.setups:
        step.sections |= host.pack(batch.setups)
    _pack_logprobs(step, host)
    if batch.copies:
        jobs = [(job.source, job.target, job.num_tokens) for job in batch.copies]
        step.sections["copies"] = np.array(jobs, np.int32).ravel()
    step.sections |= _pack_patches(batch.chunks, geometry.page_table_width)
    drafts, step.num_passes = pack_drafts(batch, geometry)
    step.sections |= drafts
    return step


def _lay_out_decode(batch: Batch, size: int, width: int, geometry: Geometry) -> PackedBatch:
    """The layout of a decode graph: `size` sequences of `width` tokens, every token a point.

    Sections: decode, the words of `decode_words`; cascade, those of `cascade_words`, where there
    are cascade groups.
    """
    chunks, count = batch.chunks, len(batch.chunks)
    none = [0] * (size - count)
    ids, starts = _token_ids(chunks, count, width)
    words = [*ids, *none * width, *[chunk.row for chunk in chunks]]
    words += [geometry.padding_row] * len(none)
    words += [*starts, *none, *[chunk.length for chunk in chunks], *none]
    offsets = range(0, count * width, width)
    return PackedBatch(
        batch=batch,
        sections={"decode": np.array(words, np.int32)}
        | _pack_groups(batch, size, geometry.page_size),
        offsets=offsets,
        num_tokens=size * width,
        num_sequences=size,
        num_decode=size,
        decode_width=width,
        replays=True,
        num_points=size * width,
        max_drafts=width - 1,
        sampling=range(count),
        first_points=offsets,
    )


def _lay_out_ragged(batch: Batch, geometry: Geometry) -> PackedBatch:
    """The layout of any other step; decode chunks are padded to the longest of them.

    Sections: those of `ragged_sections` and `_pack_points`; cascade as in `_lay_out_decode`.
    """
    chunks, num_decode = batch.chunks, batch.num_decode
    rows = np.array([chunk.row for chunk in chunks], np.int32)
    lengths = np.array([chunk.length for chunk in chunks], np.int32)
    width = int(lengths[:num_decode].max()) if num_decode else 1
    widths = lengths.copy()
    widths[:num_decode] = width
    total = int(widths.sum())
    token_ids, starts = (np.array(n, np.int32) for n in _token_ids(chunks, num_decode, width))
    offsets = np.cumsum(widths, dtype=np.int32) - widths
    in_pieces, padded = geometry.padded(total)
    padding = padded - total
    sequences: tuple[np.ndarray, ...] = widths, rows, starts, lengths
    if padding:
        # Empty sequences at the end of the decode slice, or one at the very end.
        fits = num_decode > 0 and padding % width == 0 and not in_pieces
        at, end = (num_decode, num_decode * width) if fits else (len(chunks), total)
        empty = np.full(padding // width if fits else 1, width if fits else padding, np.int32)
        fillers = empty, 0 * empty + geometry.padding_row, 0 * empty, 0 * empty
        token_ids = np.insert(token_ids, end, [0] * padding)
        sequences = tuple(
            np.concatenate([array[:at], filler, array[at:]])
            for array, filler in zip(sequences, fillers, strict=True)
        )
        if fits:
            offsets[num_decode:] += padding
            num_decode += len(empty)
    widths = sequences[0]
    sections = ragged_sections(token_ids, *sequences)
    step = PackedBatch(
        batch=batch,
        sections=sections | _pack_groups(batch, num_decode, geometry.page_size),
        offsets=offsets.tolist(),
        num_tokens=padded,
        num_sequences=len(widths),
        num_decode=num_decode,
        decode_width=width,
        max_seqlen_q=int(widths[num_decode:].max()) if num_decode < len(widths) else 1,
        in_pieces=in_pieces,
    )
    _pack_points(step, rows, offsets + lengths, geometry.token_multiple)
    return step


def _token_ids(chunks: list[Chunk], num_decode: int, width: int) -> tuple[list[int], list[int]]:
    """The ids of all tokens, decode chunks padded to `width`, and where each chunk starts."""
    starts = [c.start if c.token_ids else PENDING for c in chunks]
    if width == 1:
        ids = [c.token_ids[0] if c.token_ids else PENDING for c in chunks[:num_decode]]
    else:
        ids = []
        for chunk in chunks[:num_decode]:
            own = _own_ids(chunk)
            ids += own + [0] * (width - len(own))
    for chunk in chunks[num_decode:]:
        ids += _own_ids(chunk)
    return ids, starts


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


def _pack_points(step: PackedBatch, rows: np.ndarray, ends: np.ndarray, multiple: int) -> None:
    """Pack the points, where logits are needed: the last 1 + drafts tokens of chunks that sample.

    rows, ends: each chunk's row, and where its tokens end. Sections: points [N padded], point_rows
    [N]; first, sampled_rows [M]; drafts [M * K] and point_drafts [N * K] where there are drafts.
    """
    sampling = np.flatnonzero([chunk.samples for chunk in step.batch.chunks])
    if not len(sampling):
        return
    rows, ends = rows[sampling], ends[sampling]
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


def _pack_logprobs(step: PackedBatch, host: HostRows) -> None:
    chunks = step.batch.chunks
    flags = [host.flags[chunk.row] for chunk in chunks]
    if not any(flags):
        return
    for i, first in zip(step.sampling, step.first_points, strict=True):
        step.adjusts |= bool(flags[i] & ADJUSTS)
        if flags[i] & LOGPROBS:
            num_top = host.setups[chunks[i].row].params.logprobs or 0
            step.logprobs.append(LogprobRequest(i, first, 1 + len(chunks[i].drafts), num_top))
    targets: list[int] = []
    for i in [i for i, each in enumerate(flags) if each & PROMPT_LOGPROBS]:
        chunk, setup = chunks[i], host.setups[chunks[i].row]
        end = min(chunk.start + chunk.length, setup.prompt_length - 1)
        num_top = setup.params.prompt_logprobs or 0
        if chunk.start < setup.prompt_length:
            targets += setup.token_ids[chunk.start + 1 : end + 1]
            count = end - chunk.start
            step.prompt_logprobs.append(LogprobRequest(i, step.offsets[i], count, num_top))
    if step.logprobs:
        spans = [np.arange(r.first, r.first + r.count, dtype=np.int32) for r in step.logprobs]
        step.sections["asked"] = np.concatenate(spans)
    if step.prompt_logprobs:
        step.sections["targets"] = np.array(targets, np.int32)


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


def pack_masks(step: PackedBatch, masks: GrammarMasks, places: int) -> np.ndarray:
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


class Sent(Mapping[str, torch.Tensor]):
    """An uploaded `join(sections)`, by name. A section is cut out when it is asked for, because
    most steps of decode graphs need none."""

    def __init__(self, sections: Sections, words: torch.Tensor) -> None:
        """words: int32, at least as many as the sections have."""
        self._sections = sections
        self._words = words

    def __getitem__(self, name: str) -> torch.Tensor:
        first = 0
        for known, section in self._sections.items():
            if known == name:
                return self._words[first : first + len(section)]
            first += len(section)
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return name in self._sections

    def __iter__(self) -> Iterator[str]:
        return iter(self._sections)

    def __len__(self) -> int:
        return len(self._sections)
