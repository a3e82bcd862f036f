"""Embedding: rows of a weight in any form, times a scale, of which a rank may hold a part.

With `part` (first, count) the weight's first rows are those of `count` ids from `first` on. Rows of
other ids are zeros, so that those of all ranks add up to the rows of the whole.
"""

from typing import Any

import torch
import torch.nn.functional as F

from minisgl.kernels.grouped_linear import Quantized
from minisgl.kernels.grouped_linear.panels import GroupedPanels
from minisgl.kernels.matrix import Matrix, unpacked
from minisgl.kernels.op import Case, Cost, Implementation, Op


def embedding_reference(
    ids: torch.Tensor,
    weight: Matrix,
    part: tuple[int, int] | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """ids: [T] integers; weight: [N, K]. Returns [T, K] in the weight's type.

    Without `part` every id must have a row; on a CPU IndexError says which has none.
    """
    if part is not None:
        first, count = part
        ids = ids - first
        foreign = (ids < 0) | (ids >= count)
        ids = ids.masked_fill(foreign, 0)
    if isinstance(weight, Quantized):
        whole = weight.unpacked() if isinstance(weight, GroupedPanels) else weight
        rows = whole.chosen(ids).dequantized(weight.dtype)
    else:
        rows = F.embedding(ids, unpacked(weight))
    if part is not None:
        rows = rows.masked_fill_(foreign[:, None], 0.0)
    return rows if scale is None else rows * scale


def _cost(ids: torch.Tensor, weight: Matrix, **_: Any) -> Cost:
    values = len(ids) * weight.shape[1]
    return Cost(bytes=4 * values, flops=values)


def _case(label: str, rows: int, inputs: int, **how: Any) -> Case:
    """Seven ids; with a part two of them are of ranks before and behind it."""

    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        on = generator.device
        first, count = how.get("part", (0, rows))
        ids = torch.randint(first, first + count, (7,), generator=generator, device=on)
        if "part" in how:
            ids[1], ids[-1] = first - 1, first + count
        weight = torch.randn(rows, inputs, generator=generator, device=on)
        return {"ids": ids.to(device, torch.int32), "weight": weight.to(device, dtype)} | how

    return Case(label, make)


embedding = Op(
    "embedding",
    embedding_reference,
    implementations=[
        Implementation("cpu", "cpu", "minisgl.kernels.embedding.cpu:embedding_cpu"),
        Implementation("torch", "cuda", "minisgl.kernels.embedding:embedding_reference"),
    ],
    cases=(
        _case("plain", 131, 33),
        _case("scaled", 64, 72, scale=5.65625),
        _case("part", 40, 70, part=(80, 37)),
        _case("part-scaled", 40, 32, part=(40, 40), scale=0.5),
    ),
    cost=_cost,
)
