"""The order in which persistent programs take tiles of queries, against sorting them."""

import pytest
import torch

from minisgl.kernels.attention.tiles import STEP, tile_list
from tests.kernels.cards import poisoned

RANDOM = torch.Generator().manual_seed(7)
MANY = torch.randint(0, 60, (2, 36), generator=RANDOM)
CALLS = {
    "one": ([1], [1]),
    "whole-tiles": ([64, 32], [64, 32]),
    "odd": ([33, 7, 65, 1], [1300, 3000, 65, 5000]),
    "no-queries": ([0, 40, 0, 0, 3, 0], [12, 4096, 0, 9, 2048, 1]),
    "nothing": ([0, 0], [5, 0]),
    "no-keys": ([40, 70, 1], [0, 3, 0]),  # more queries than keys
    "at-a-step": ([96, 96, 96], [STEP, STEP + 1, 2 * STEP]),
    "one-long": ([1200, *[1] * 16], [1200, *range(1, 17)]),
    "many": (MANY[0].tolist(), (MANY.sum(0) * 40).tolist()),
}


def ordered(queries: list[int], lengths: list[int], tokens: int) -> list[list[int]]:
    """[sequence, tile]: falling steps of keys; a sequence's together, the last tile first."""
    found = []
    for s, (n, length) in enumerate(zip(queries, lengths, strict=True)):
        for tile in range(-(-n // tokens)):
            end = min(length, length - n + (tile + 1) * tokens)
            found.append((-max(-(-end // STEP), 1), s, -tile))
    return [[s, -tile] for _, s, tile in sorted(found)]


@pytest.mark.parametrize("tokens", [1, 21, 32])
@pytest.mark.parametrize(("queries", "lengths"), CALLS.values(), ids=CALLS)
def test_tiles_stand_in_order_and_none_is_empty(queries, lengths, tokens):
    offsets = torch.tensor([0, *queries]).cumsum(0).int()
    with poisoned():
        found = tile_list(offsets, torch.tensor(lengths).int(), tokens, sum(queries))
    expected = ordered(queries, lengths, tokens)
    assert found[0, 0] == len(expected) <= len(found) - 1
    assert found[1 : 1 + len(expected)].tolist() == expected
    assert torch.all(found[1 + len(expected) :] == -7)  # nothing is written past them
