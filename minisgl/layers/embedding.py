"""Token embedding and the output head, both split over the vocabulary."""

from collections.abc import Iterator

import torch

from minisgl.kernels.embedding import embedding
from minisgl.kernels.matrix import Matrix, packed, product
from minisgl.layers.weights import Block, Placement, Weight


class VocabTable(Block):
    """Rows of a [vocab, hidden] matrix held by one rank; the last rank's may be fewer."""

    matrices = ("weight",)

    def __init__(self, name: str, vocab_size: int, hidden_size: int, at: Placement) -> None:
        self.name = name
        self.comm = at.comm
        self.vocab_size = vocab_size
        per_rank = -(-vocab_size // at.comm.size)
        self.start = min(at.comm.rank * per_rank, vocab_size)
        self.count = min(per_rank, vocab_size - self.start)
        # Zeros in rows of no token, where ranks do not divide the vocabulary.
        self.weight: Matrix = at.matrix([name], per_rank, hidden_size)

    def weights(self) -> Iterator[Weight]:
        shape = (self.vocab_size, self.weight.shape[1])
        yield Weight(f"{self.name}.weight", self.weight[: self.count], shape, 0, self.start)

    def pack(self) -> None:
        self.weight = packed(self.weight)

    def embed(self, ids: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        """ids: [T] integers. Returns [T, hidden], times the scale."""
        part = None if self.comm.size == 1 else (self.start, self.count)
        return self.comm.all_reduce(embedding(ids, self.weight, part, scale))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [N, hidden]. Returns [N, vocab] fp32 on rank 0, elsewhere this rank's columns."""
        return self.comm.gather(product(hidden, self.weight, wide=True), self.vocab_size)
