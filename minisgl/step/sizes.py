"""Sizes: of graphs, of padded steps, and of what a step uploads."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from minisgl.core.batch import MAX_CASCADE_GROUPS
from minisgl.core.executor import Limits
from minisgl.models.decoder import ROPE_SLACK

STAGING_SLACK = 2**16  # words for what a step sends besides: page-table patches, copy jobs, setups


@dataclass(frozen=True)
class GraphSizes:
    """The decode graphs there are: by width (tokens per sequence), the numbers of sequences."""

    by_width: Mapping[int, Sequence[int]]  # each rising
    pieces: Sequence[int] = ()  # numbers of tokens with piecewise graphs, rising

    @classmethod
    def of(
        cls,
        most: int,
        widths: Iterable[int],
        any_size: bool,
        multiple: int,
        most_in_pieces: int = 0,
    ) -> "GraphSizes":
        """Graphs for up to `most` sequences, piecewise ones for up to `most_in_pieces` tokens.

        any_size: graphs of every size cost nothing, so sequences are not padded. Tokens are, where
        `multiple` is not 1: to multiple / 2, then to its multiples (`padded_size`). The sizes of
        piecewise graphs depend on neither.
        """
        by_width = {width: _sizes(most, width, any_size, multiple) for width in widths}
        return cls(by_width, tuple(piece_sizes(most_in_pieces)))

    @property
    def max_sequences(self) -> int:
        return max((sizes[-1] for sizes in self.by_width.values()), default=0)

    @property
    def max_tokens(self) -> int:
        return max((sizes[-1] * width for width, sizes in self.by_width.items()), default=0)

    @property
    def staging_words(self) -> int:
        """int32 words of the buffer that steps of decode graphs are uploaded to."""
        longest = (
            sum(decode_words(sizes[-1], width)) + sum(cascade_words(sizes[-1])) + sizes[-1] * width
            for width, sizes in self.by_width.items()
        )
        return STAGING_SLACK + max(longest) if self.by_width else 0


@dataclass(frozen=True)
class Geometry:
    """What packing must know of the buffers, and to which sizes steps are padded."""

    page_table_width: int  # entries of a row
    padding_row: int
    token_multiple: int = 1  # T and N are padded by it (`padded_size`); 1 = not padded
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

    def padded(self, tokens: int) -> tuple[bool, int]:
        """Whether a ragged step of so many runs in pieces, and how many it has with padding."""
        sizes = self.piece_sizes
        if sizes and tokens <= sizes[-1]:
            return True, sizes[bisect_left(sizes, tokens)]
        return False, padded_size(tokens, self.token_multiple)


def decode_words(size: int, width: int) -> tuple[int, int, int, int]:
    """Lengths of what a decode graph's step sends first, one after another: token_ids, then rows,
    starts and num_tokens of its sequences."""
    return size * width, size, size, size


def cascade_words(size: int) -> tuple[int, int]:
    """Lengths of what a step with cascade groups sends next: the groups and each sequence's shared
    tokens, as `ForwardInputs` has them."""
    return 3 * MAX_CASCADE_GROUPS, size


def padded_size(count: int, multiple: int) -> int:
    """`count` padded to multiple / 2, then to multiples of it: for 8 to 4, 8, 16, 24 and so on."""
    if multiple == 1 or count == 0:
        return count
    return multiple // 2 if count <= multiple // 2 else -(-count // multiple) * multiple


def piece_sizes(most: int) -> Iterator[int]:
    """Multiples of 8 up to at least `most`, an eighth apart, but at most ROPE_SLACK: the rope
    tables have that many entries for padding."""
    size = 0
    while size < most:
        size += min(max(8, 2 ** (size.bit_length() - 4)), ROPE_SLACK)
        yield size


def padded_sizes(most: int) -> tuple[int, ...]:
    """1, 2, 4, 8, 16, 24 and so on, up to at least `most`."""
    sizes = [1, 2, 4, *range(8, most + 8, 8)]
    return tuple(size for size, below in zip(sizes, [0, *sizes[:-1]], strict=True) if below < most)


def _sizes(most: int, width: int, any_size: bool, multiple: int) -> tuple[int, ...]:
    if multiple == 1:
        return tuple(range(1, most + 1)) if any_size else padded_sizes(most)
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


def draft_sizes(max_rows: int, *, any_size: bool) -> tuple[int, ...]:
    """The numbers of rows that a pass of the draft model may have: those of its graphs."""
    return tuple(range(1, max_rows + 1)) if any_size else padded_sizes(max_rows)
