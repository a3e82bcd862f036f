"""Packed inputs against a brute-force reading of the batch, token by token."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.core.batch import PENDING, Batch, Chunk, RowSetup
from minisgl.core.request import SamplingParams
from minisgl.device import CpuDevice
from minisgl.kernels.advance import accept_and_advance, prepare_inputs, prepare_points
from minisgl.step.inputs import (
    PackedBatch,
    Sent,
    join,
    pack_step,
)
from minisgl.step.rows import HostRows, RowBuffers
from minisgl.step.sizes import Geometry, decode_words, padded_size
from tests.kernels.cards import tensors

ROWS, PAGES, VOCAB = 9, 6, 50


@dataclass
class World:
    """What the device should hold, kept in Python."""

    page_size: int
    last: list[int] = field(default_factory=lambda: list(range(100, 100 + ROWS + 1)))
    lengths: list[int] = field(default_factory=lambda: [3 * row for row in range(ROWS + 1)])
    table: dict[tuple[int, int], int] = field(default_factory=dict)

    def slot(self, row: int, position: int) -> int:
        page = self.table.get((row, position // self.page_size), 0)
        return page * self.page_size + position % self.page_size


@st.composite
def batches(draw: st.DrawFn) -> tuple[World, Batch, Geometry]:
    page_size = draw(st.sampled_from([1, 16]))
    world = World(page_size)
    rows = draw(st.permutations(range(ROWS)))
    num_decode = draw(st.integers(0, 5))
    num_prefill = draw(st.integers(0 if num_decode else 1, 4))
    most_drafts = draw(st.sampled_from([0, 0, 3]))
    capacity = PAGES * page_size
    chunks = []
    for index in range(num_decode + num_prefill):
        row = rows[index]
        drafts, ids = [], []
        if index < num_decode:
            drafts = draw(st.lists(st.integers(0, VOCAB - 1), max_size=most_drafts))
            length = 1 + len(drafts)
            start = world.lengths[row] = draw(st.integers(0, max(0, capacity - length)))
            if draw(st.booleans()):
                ids = [draw(st.integers(0, VOCAB - 1))]
            elif start:
                start -= draw(st.integers(0, 1))  # a lower bound
            samples = True
        else:
            length = draw(st.integers(1, min(9, capacity)))
            start = draw(st.integers(0, capacity - length))
            ids = draw(st.lists(st.integers(0, VOCAB - 1), min_size=length, max_size=length))
            samples = draw(st.booleans())
        first = draw(st.integers(0, PAGES))
        pages = draw(st.lists(st.integers(0, 99), max_size=PAGES - first))
        for offset, page in enumerate(pages):
            world.table[row, first + offset] = page
        chunks.append(Chunk(index, 0, row, start, length, ids, first, pages, samples, drafts))
    multiple = draw(st.sampled_from([1, 8]))
    sizes = draw(st.sampled_from([{}, {1: (1, 2, 4, 8)}, {1: (1, 4), 3: (2, 4)}]))
    staging = draw(st.sampled_from([70, 10_000]))
    pieces = draw(st.sampled_from([(), (8, 16, 24)]))
    geometry = Geometry(
        PAGES, ROWS, multiple, sizes, staging, page_size=page_size, piece_sizes=pieces
    )
    return world, Batch(7, chunks, num_decode), geometry


@settings(max_examples=300)
@given(batches())
def test_inputs_say_what_the_batch_says(case: tuple[World, Batch, Geometry]):
    world, batch, geometry = case
    host = HostRows(ROWS, VOCAB)
    step = pack_step(batch, host, geometry)
    sent = dict(Sent(step.sections, torch.from_numpy(join(step.sections))))
    device = CpuDevice(num_threads=1)
    rows = RowBuffers(device, ROWS, PAGES, VOCAB)
    device.close()
    rows.last.copy_(torch.tensor(world.last))
    rows.lengths.copy_(torch.tensor(world.lengths))
    rows.apply(sent)
    tokens, sequences = step.num_tokens, step.num_sequences
    ids = torch.full((tokens,), -7, dtype=torch.int32)
    positions = torch.full((tokens,), -7, dtype=torch.int64)
    slots = torch.full((tokens,), -7, dtype=torch.int64)
    seq_lens = torch.full((sequences,), -7, dtype=torch.int32)
    if step.replays:
        sent |= decode_constants(step, sent["decode"])
    sections = ("token_ids", "sequences", "offsets", "rows", "starts", "num_tokens")
    prepare_inputs(
        ids,
        positions,
        slots,
        seq_lens,
        *(sent[name] for name in sections),
        rows.last,
        rows.lengths,
        rows.page_table,
        world.page_size,
    )
    offsets, sent_rows = sent["offsets"].tolist(), sent["rows"].tolist()
    assert offsets[-1] == tokens

    # A decode graph is taken where there is one for such a step, and the step fits its staging.
    longest = max(chunk.length for chunk in batch.chunks)
    fitting = [
        (own, size)
        for own, sizes in geometry.decode_sizes.items()
        for size in sizes
        if own >= longest and size >= len(batch.chunks)
    ]
    if step.replays:
        assert batch.num_decode == len(batch.chunks)
        assert (step.decode_width, sequences) == min(fitting)
        assert len(join(step.sections)) <= geometry.staging
        assert next(iter(step.sections)) == "decode"
    elif batch.num_decode == len(batch.chunks) and fitting:
        assert geometry.staging == 70

    # Every chunk's own tokens, in the batch's order, are where its sequence is.
    width = step.decode_width
    order = list(range(batch.num_decode))
    order += range(step.num_decode, step.num_decode + len(batch.chunks) - batch.num_decode)
    points = []
    for chunk, sequence in zip(batch.chunks, order, strict=True):
        at = offsets[sequence]
        begin = chunk.start if chunk.token_ids else world.lengths[chunk.row]
        fed = (chunk.token_ids or [world.last[chunk.row]]) + chunk.drafts
        padded = width if sequence < step.num_decode else chunk.length
        assert sent_rows[sequence] == chunk.row
        assert seq_lens[sequence] == begin + padded
        for i, token in enumerate(fed):
            assert ids[at + i] == token
            assert positions[at + i] == begin + i
            assert slots[at + i] == world.slot(chunk.row, begin + i)
        assert (slots[at + len(fed) : at + padded] == -1).all()
        if chunk.samples:
            points += range(at + len(fed) - 1 - len(chunk.drafts), at + len(fed))
    if step.replays:  # every token is a point, and each chunk's first one its first
        sampled = (chunk for i, chunk in enumerate(batch.chunks) if i in step.sampling)
        spans = zip(step.first_points, sampled, strict=True)
        assert points == [first + n for first, chunk in spans for n in range(chunk.length)]
        assert step.num_points == tokens
        assert step.max_drafts == step.decode_width - 1
    else:
        assert sent.get("points", torch.empty(0)).tolist()[: step.num_points] == points
        assert step.num_points == len(points)

    # The rest is padding.
    for sequence in set(range(sequences)) - set(order):
        assert sent_rows[sequence] == ROWS
        assert seq_lens[sequence] == 0
        assert (slots[offsets[sequence] : offsets[sequence + 1]] == -1).all()
    assert all(offsets[s + 1] - offsets[s] == width for s in range(step.num_decode))
    chunk_widths = np.diff(offsets[step.num_decode :])
    assert step.max_seqlen_q == (chunk_widths.max() if len(chunk_widths) else 1)
    if step.in_pieces:  # one sequence at the end
        assert not step.replays
        assert tokens == next(s for s in geometry.piece_sizes if s >= tokens)
        assert sequences - len(batch.chunks) == (tokens > sum(np.diff(offsets)[order]))
    elif not step.replays:
        assert not geometry.piece_sizes or tokens > geometry.piece_sizes[-1]
        if geometry.token_multiple == 8:
            assert tokens == 4 or tokens % 8 == 0


def decode_constants(step: PackedBatch, packed: torch.Tensor) -> dict[str, torch.Tensor]:
    """The sections of a decode graph's step by name, with those that never change."""
    size, width = step.num_sequences, step.decode_width
    lengths = decode_words(size, width)
    assert len(packed) == sum(lengths)
    names = ("token_ids", "rows", "starts", "num_tokens")
    return dict(zip(names, packed.split(lengths), strict=True)) | {
        "sequences": torch.tensor([s for s in range(size) for _ in range(width)]).int(),
        "offsets": torch.tensor([s * width for s in range(size + 1)]).int(),
    }


@pytest.mark.parametrize(
    ("count", "multiple", "want"),
    [(0, 8, 0), (1, 8, 4), (4, 8, 4), (5, 8, 8), (8, 8, 8), (9, 8, 16), (7, 1, 7)],
)
def test_padded_size(count: int, multiple: int, want: int):
    assert padded_size(count, multiple) == want


@pytest.mark.parametrize("case", accept_and_advance.cases, ids=lambda case: case.label)
def test_rows_advance_by_what_was_accepted(case):
    a = case.make(torch.device("cpu"), torch.float32, torch.Generator().manual_seed(4))
    before = a["counts"].clone()
    accepted = accept_and_advance(*a.values()).tolist()
    ends = [*a["first"].tolist()[1:], len(a["tokens"])]
    tokens, positions = a["tokens"].tolist(), a["positions"].tolist()
    touched = set()
    for m, row in enumerate(a["rows"].tolist()):
        first = int(a["first"][m])
        drafts = [d for d in a["drafts"][m].tolist() if d != PENDING]
        assert first + len(drafts) + 1 == ends[m]
        want = 0
        while want < len(drafts) and drafts[want] == tokens[first + want]:
            want += 1
        assert accepted[m] == want
        assert a["last"][row] == tokens[first + want]
        assert a["lengths"][row] == positions[first + want]
        grown = a["counts"][row] - before[row]
        new = tokens[first : first + want + 1] if a["counted"][row] else []
        assert grown.tolist() == np.bincount(np.array(new, int), minlength=37).tolist()
        if "previous" in a:
            assert a["previous"][row] == a["ids"][first + want]
        touched.add(row)
    others = [row for row in range(len(before)) if row not in touched]
    assert torch.equal(a["counts"][others], before[others])


def test_malformed_batches_are_refused():
    host, geometry = HostRows(ROWS, VOCAB), Geometry(PAGES, ROWS, page_size=16)
    with pytest.raises(ValueError, match="batch 3 has no chunks"):
        pack_step(Batch(3, [], 0), host, geometry)
    short = Chunk(5, 0, 0, 0, 4, [1, 2], 0, [], True)
    with pytest.raises(ValueError, match="sequence 5 has length 4 but 2 token ids"):
        pack_step(Batch(3, [short], 0), host, geometry)
    far = Chunk(5, 0, 0, 0, 1, [1], PAGES, [1], True)
    with pytest.raises(ValueError, match=f"needs {PAGES + 1} pages"):
        pack_step(Batch(3, [far], 0), host, geometry)


def test_prompt_logprob_targets_are_the_next_prompt_tokens():
    host, geometry = (
        HostRows(ROWS, VOCAB),
        Geometry(PAGES, ROWS, token_multiple=8, page_size=16),
    )
    prompt = [11, 12, 13, 14, 15]
    params = SamplingParams(prompt_logprobs=2)
    setup = RowSetup(1, 0, 4, 0, 5, params, prompt)
    found = []
    for start, stop in ((0, 2), (2, 5)):
        chunk = Chunk(1, 0, 4, start, stop - start, prompt[start:stop], 0, [], stop == 5)
        decode = Chunk(2, 0, 3, 8, 1, [], 0, [], True)
        step = pack_step(Batch(0, [decode, chunk], 1, [setup][start:]), host, geometry)
        (request,) = step.prompt_logprobs
        assert (request.chunk, request.num_top) == (1, 2)
        # Padding follows the decode slice, so the chunk's first token has moved.
        at = step.sections["offsets"].tolist()[step.num_decode]
        assert request.first == at
        targets = step.sections["targets"].tolist()
        assert request.count == len(targets)
        found += targets
    assert found == prompt[1:]


@pytest.mark.parametrize(
    "op", [prepare_inputs, prepare_points, accept_and_advance], ids=lambda op: op.name
)
def test_the_cpu_implementations_equal_their_references(op):
    for case in op.cases:
        for seed in range(5):
            made = [
                case.make(torch.device("cpu"), torch.float32, torch.Generator().manual_seed(seed))
                for _ in range(2)
            ]
            got = op.implementation("cpu")(*made[0].values())
            want = op.reference(*made[1].values())
            for (_, found), (_, wanted) in zip(tensors("", got), tensors("", want), strict=True):
                assert torch.equal(found, wanted)
            for name, value in made[0].items():
                if isinstance(value, torch.Tensor):
                    assert value.dtype == made[1][name].dtype
                    assert torch.equal(value, made[1][name]), (case.label, name)
