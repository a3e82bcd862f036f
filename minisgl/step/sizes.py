"""The sizes of graphs, and those that steps are padded to."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from minisgl.core.executor import Limits
from minisgl.models.decoder import ROPE_SLACK
from minisgl.step.inputs import cascade_words, decode_words

FP32_CPU_ROWS = 8  # CPU matrix products treat a row alike whatever others are there, in 8s
STAGING_SLACK = 2**16  # words for what a step sends besides: page-table patches, copy jobs, setups


@dataclass(frozen=True)
class GraphSizes:
    """The decode graphs there are: by width (tokens per sequence), the numbers of sequences."""

    by_width: Mapping[int, Sequence[int]]  # each rising
    pieces: Sequence[int] = ()  # numbers of tokens with piecewise graphs, rising

    @classmethod
    def of(
        cls, most: int, widths: Iterable[int], on_cpu: bool, multiple: int, most_in_pieces: int = 0
    ) -> "GraphSizes":
        """Graphs for up to `most` sequences, piecewise ones for up to `most_in_pieces` tokens.

        A CPU needs no padding, for any size replays at once there, but that of tokens to half of
        `multiple` or its multiples. Piecewise graphs have their sizes everywhere.
        """
        by_width = {width: _sizes(most, width, on_cpu, multiple) for width in widths}
        return cls(by_width, tuple(piece_sizes(most_in_pieces)))

    @property
    def max_sequences(self) -> int:
        return max((sizes[-1] for sizes in self.by_width.values()), default=0)

    @property
    def max_tokens(self) -> int:
        return max((sizes[-1] * width for width, sizes in self.by_width.items()), default=0)

    @property
    def staging_words(self) -> int:
        """int32 words of the place where a step's upload lands."""
        longest = (
            sum(decode_words(sizes[-1], width)) + sum(cascade_words(sizes[-1])) + sizes[-1] * width
            for width, sizes in self.by_width.items()
        )
        return STAGING_SLACK + max(longest, default=0)


def piece_sizes(most: int) -> Iterator[int]:
    """Multiples of 8 up to at least `most`, an eighth apart but at most as far as the rope tables
    have slack: padding has positions of its own, from 0."""
    size = 0
    while size < most:
        size += min(max(8, 2 ** (size.bit_length() - 4)), ROPE_SLACK)
        yield size


def padded_sizes(most: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, 24 and so on, up to at least `most`."""
    sizes = [1, 2, 4, *range(8, most + 8, 8)]
    return tuple(size for size, below in zip(sizes, [0, *sizes[:-1]], strict=True) if below < most)


def _sizes(most: int, width: int, on_cpu: bool, multiple: int) -> tuple[int, ...]:
    if multiple == 1:
        return tuple(range(1, most + 1)) if on_cpu else padded_sizes(most)
    step, half = multiple // math.gcd(multiple, width), multiple // 2
    sizes = range(step, most + step, step)
    if half % width:
        return tuple(sizes)
    return (half // width, *(size for size in sizes if half // width < most))


def mask_words(vocab: int) -> int:
    """int32 words of one grammar mask."""
    return -(-vocab // 32)


def page_table_width(limits: Limits) -> int:
    """Pages of one row, padding behind a context included."""
    return -(-(limits.max_context + ROPE_SLACK) // limits.page_size)


def draft_sizes(max_rows: int, on_cpu: bool) -> tuple[int, ...]:
    """The numbers of rows that a pass may have: on a GPU those of its graphs."""
    return tuple(range(1, max_rows + 1)) if on_cpu else padded_sizes(max_rows)


def token_multiple(dtype: torch.dtype, on_cpu: bool) -> int:
    """Steps have half as many tokens, or a multiple of it; 1 = any number."""
    return FP32_CPU_ROWS if on_cpu and dtype == torch.float32 else 1
