"""What steps need beside weights and KV: activations, logits, decode graphs. In bytes, ahead.

Planned before anything large is allocated, so these are upper estimates; what capturing really took
is measured and said.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from minisgl.models.config import ModelConfig
from minisgl.models.decoder import ROPE_SLACK
from minisgl.runtime.inputs import cascade_words, decode_words

STAGING_SLACK = 2**16  # words for what a step sends besides: page-table patches, copy jobs, setups
# A captured kernel's launch, in the driver and on the device; a guess until it is measured.
NODE_BYTES = 16 * 2**10
NODES_PER_LAYER = 14
OTHER_NODES = 40  # of the passes' ends, and of the three sampling halves


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

    def static_bytes(self, vocab: int) -> int:
        """Of the buffers that all graphs share."""
        masks = self.max_tokens * (1 + mask_words(vocab))
        others = 6 * self.max_tokens + 3 * self.max_sequences
        return 4 * (self.staging_words + masks + others) if self.by_width else 0

    def captured_bytes(
        self, facts: ModelConfig, dtype: torch.dtype, ranks: int, cascade: bool = False
    ) -> int:
        """Of the graphs themselves: activations and logits of the largest, hidden states of all.

        With `cascade` there is a forward pass more for each, with two launches more per layer.
        """
        tokens = sum(width * sum(sizes) for width, sizes in self.by_width.items())
        nodes = facts.num_layers * NODES_PER_LAYER + OTHER_NODES
        if cascade:
            nodes += facts.num_layers * (NODES_PER_LAYER + 2)
        count = sum(map(len, self.by_width.values()))
        return (
            workspace_bytes(facts, self.max_tokens, dtype, ranks)
            + 2 * self.max_tokens * facts.vocab_size * 4
            + tokens * facts.hidden_size * dtype.itemsize
            + count * nodes * NODE_BYTES
        )

    def pieces_bytes(self, facts: ModelConfig, dtype: torch.dtype, ranks: int) -> int:
        """Of the piecewise graphs: what they share, activations of the largest, their launches."""
        if not self.pieces:
            return 0
        most, heads = self.pieces[-1], 2 * facts.num_heads * facts.head_dim // ranks
        nodes = len(self.pieces) * (facts.num_layers * NODES_PER_LAYER + OTHER_NODES)
        return (
            most * (20 + (heads + facts.hidden_size) * dtype.itemsize)
            + workspace_bytes(facts, most, dtype, ranks)
            + nodes * NODE_BYTES
        )


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


def workspace_bytes(facts: ModelConfig, tokens: int, dtype: torch.dtype, ranks: int) -> int:
    """Activations that live at once in one layer: residual, normed, qkv and attention, gate-up."""
    heads = (2 * facts.num_heads + 2 * facts.num_kv_heads) * facts.head_dim
    inner = max(
        facts.inner_size,
        *((layer.moe.inner_size * layer.moe.top_k) if layer.moe else 0 for layer in facts.layers),
    )
    per_token = 4 * facts.hidden_size + (heads + 3 * inner) // ranks
    return tokens * per_token * dtype.itemsize


def logits_bytes(vocab: int, rows: int) -> int:
    """Logits in fp32 and three temporaries of the sampler of that size."""
    return 4 * rows * vocab * 4
