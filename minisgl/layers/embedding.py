"""Token embedding and the output head, both split over the vocabulary."""

from collections.abc import Iterator

import torch

from minisgl.kernels.matrix import Matrix, embedding, packed, product
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

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [T] integers. Returns [T, hidden]."""
        if self.comm.size == 1:
            return embedding(ids, self.weight)
        local = ids - self.start
        foreign = (local < 0) | (local >= self.count)
        rows = embedding(local.masked_fill(foreign, 0), self.weight)
        return self.comm.all_reduce(rows.masked_fill_(foreign[:, None], 0.0))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [N, hidden]. Returns [N, vocab] fp32 on rank 0, elsewhere this rank's columns."""
        logits = product(hidden, self.weight, wide=True)
        return self.comm.gather(logits)[:, : self.vocab_size]
