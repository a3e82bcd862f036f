"""Linear layers: checkpoint matrices fused by rows, split over ranks by rows or by columns."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from minisgl.kernels.matrix import Matrix, packed, product
from minisgl.layers.weights import Block, Placement, Weight
from minisgl.parallel import share


@dataclass(frozen=True)
class Part:
    """One checkpoint matrix inside a fused one: `units` groups of `width` output rows.

    Units are what ranks share out: heads in a projection of heads, single rows elsewhere.
    """

    name: str
    units: int
    width: int = 1
    repeated: bool = False  # ranks beyond the units hold copies


class ColumnLinear(Block):
    """y = x W^T + b. The outputs are shared over ranks, so no communication is needed.

    W [out, in] stacks the parts: queries, keys and values in one product, gate and up in one.
    """

    matrices = ("weight",)

    def __init__(
        self, prefix: str, in_features: int, parts: Sequence[Part], *, bias: bool, at: Placement
    ) -> None:
        self.prefix = prefix
        self.in_features = in_features
        self.parts = parts
        self.shares = [
            share(f"{prefix}.{part.name}", part.units, at.comm, repeated=part.repeated)
            for part in parts
        ]
        rows = sum(count * part.width for part, (_, count) in zip(parts, self.shares, strict=True))
        names = [f"{prefix}.{part.name}" for part in parts]
        self.weight: Matrix = at.matrix(names, rows, in_features)
        self.bias = at.empty(rows) if bias else None

    def weights(self) -> Iterator[Weight]:
        row = 0
        for part, (first, count) in zip(self.parts, self.shares, strict=True):
            name, out = f"{self.prefix}.{part.name}", part.units * part.width
            rows, start = slice(row, row + count * part.width), first * part.width
            row = rows.stop
            yield Weight(f"{name}.weight", self.weight[rows], (out, self.in_features), 0, start)
            if self.bias is not None:
                yield Weight(f"{name}.bias", self.bias[rows], (out,), 0, start)

    def pack(self) -> None:
        self.weight = packed(self.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return product(x, self.weight, self.bias)  # type: ignore[no-any-return]


class RowLinear(Block):
    """y = x W^T + b. The inputs are shared over ranks, whose outputs add up to y."""

    matrices = ("weight",)

    def __init__(
        self, prefix: str, part: Part, out_features: int, *, bias: bool, at: Placement
    ) -> None:
        """The units and widths of `part` are those of the inputs."""
        self.name = f"{prefix}.{part.name}"
        self.comm = at.comm
        self.in_features = part.units * part.width
        first, count = share(self.name, part.units, at.comm)
        self.start = first * part.width
        self.weight: Matrix = at.matrix([self.name], out_features, count * part.width)
        self.bias = at.empty(out_features) if bias else None

    def weights(self) -> Iterator[Weight]:
        out = self.weight.shape[0]
        yield Weight(f"{self.name}.weight", self.weight, (out, self.in_features), 1, self.start)
        if self.bias is not None:
            yield Weight(f"{self.name}.bias", self.bias, (out,))

    def pack(self) -> None:
        self.weight = packed(self.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of y; rank 0's has the bias."""
        bias = self.bias if self.comm.rank == 0 else None
        return product(x, self.weight, bias)  # type: ignore[no-any-return]
