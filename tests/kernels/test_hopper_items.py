"""Which program of the Hopper kernel takes which item, by the kernel's own arithmetic.

No interpreter runs Gluon, but this part of it is integers: here they are Python's.
"""

from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch

from minisgl.kernels.attention import hopper_feed
from minisgl.kernels.attention.tiles import tile_list

BN = 128


class Pointer(NamedTuple):
    values: list[int]
    at: int = 0

    def __add__(self, steps: int) -> "Pointer":
        return Pointer(self.values, self.at + steps)


def _load(pointer: Pointer, mask: bool = True, other: int = 0) -> int:
    assert not mask or 0 <= pointer.at < len(pointer.values)
    return pointer.values[pointer.at] if mask else other


def taken(
    queries: list[int], lengths: list[int], heads: int, tokens: int, programs: int
) -> list[list[tuple[int, ...]]]:
    """The items of each program, in its order."""
    offsets, keys = torch.tensor([0, *queries]).cumsum(0).int(), torch.tensor(lengths).int()
    listed = tile_list(offsets, keys, tokens, sum(queries)).flatten().tolist()
    pointers = [Pointer(values) for values in (listed, offsets.tolist(), lengths)]
    found = []
    for program in range(programs):
        language = SimpleNamespace(
            load=_load,
            minimum=min,
            maximum=max,
            where=lambda condition, one, other: one if condition else other,
            cdiv=lambda x, y: -(-x // y),
            program_id=lambda _, program=program: program,
            num_programs=lambda _: programs,
        )
        with patch.object(hopper_feed, "gl", language):
            laps = hopper_feed.laps.fn(pointers[0], heads)
            items = [
                hopper_feed.item_of.fn(lap, *pointers, heads, tokens, BN) for lap in range(laps)
            ]
        found.append([item for item in items if item[-1] > 0])
    return found


@pytest.mark.parametrize("programs", [1, 3, 8, 132])
@pytest.mark.parametrize(
    ("queries", "lengths"),
    [
        ([33, 7, 65, 1], [1300, 3000, 65, 5000]),
        ([0, 40, 0, 0, 3, 0], [12, 4096, 0, 9, 2048, 1]),
        ([40, 70], [0, 3]),  # more queries than keys
        ([0], [5]),
    ],
)
def test_every_item_is_taken_once(queries, lengths, programs):
    expected = []
    for s, (n, length) in enumerate(zip(queries, lengths, strict=True)):
        for first in range(0, n, 21):
            position = length - n + first
            end = min(length, position + 21)
            tiles = max(-(-end // BN), 1)
            facts = (first, sum(queries[:s]), n, position, end, tiles)
            expected += [(s, head, *facts) for head in range(3)]
    found = taken(queries, lengths, heads=3, tokens=21, programs=programs)
    assert sorted(item for items in found for item in items) == sorted(expected)


def test_programs_have_alike_to_do():
    """A prompt of 8k tokens, with tiles of 128 rows of 4 heads to a key head."""
    found = taken([8192], [8192], heads=8, tokens=32, programs=132)
    sums = [sum(item[-1] for item in items) for items in found]
    assert max(sums) <= 1.03 * sum(sums) / len(sums)
