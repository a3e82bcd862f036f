"""What layers are built with, and where a checkpoint's tensors go in them.

Every layer lists its own `Weight`s; the loader fills them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from minisgl.device.cpu import lazy_zeros
from minisgl.kernels.attention import attention
from minisgl.kernels.grouped_linear.blocks import Form, GroupedBlocks, empty
from minisgl.kernels.grouped_linear.weights import Grouped
from minisgl.kernels.matrix import Matrix, tensors
from minisgl.kernels.op import Op
from minisgl.parallel import Communicator

Forms = tuple[Form | None, ...]


@dataclass(frozen=True)
class Placement:
    """The same for all layers of a model: where they live, in what type, among which ranks, what
    computes the attention of prompts, and which weights are quantised.

    group: the group size of the matrix that stacks those of such names, of this shape; None for
    one of floats. activations: what quantised weights are multiplied with.
    """

    dtype: torch.dtype
    device: torch.device
    comm: Communicator = Communicator()
    attention: Op = attention
    group: Callable[[Sequence[str], Sequence[int]], int | None] = lambda names, shape: None
    activations: Literal["float", "int8"] = "float"

    def empty(self, *shape: int) -> torch.Tensor:
        return self._zeros(shape, self.dtype)

    def matrix(self, names: Sequence[str], *shape: int) -> Matrix:
        """A weight [..., N, K] of products that stacks those of such names, filled with zeros."""
        group = self.group(names, shape)
        if group is None:
            return self.empty(*shape)
        groups = (*shape[:-1], shape[-1] // group)
        numbers = (self._zeros(groups, torch.float32) for _ in range(2))
        codes = self._zeros(shape, torch.uint8)
        return Grouped(codes, *numbers, self.dtype, self.activations)

    def _zeros(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if self.device.type == "cpu":
            return lazy_zeros(shape, dtype)  # in huge pages: a step reads all of them
        return torch.zeros(shape, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint and the place its part for this rank is copied to.

    `target` is a view of a parameter, so that fused and sharded parameters are filled piece by
    piece and nothing is allocated twice. `dim` is the dimension that is split over ranks, `start`
    where this rank's part begins in it; the length is the target's.
    """

    name: str
    target: torch.Tensor | Grouped
    shape: tuple[int, ...]  # in the checkpoint
    dim: int = 0
    start: int = 0

    @property
    def slices(self) -> tuple[slice, ...]:
        """What of the checkpoint's tensor belongs here."""
        slices = [slice(None)] * len(self.shape)
        slices[self.dim] = slice(self.start, self.start + self.target.shape[self.dim])
        return tuple(slices)

    def parts(self, size: int) -> Iterator["Weight"]:
        """Itself some rows after others, of at most `size` elements together; all at once where its
        columns are split over ranks."""
        rows, *others = self.target.shape
        if self.dim and tuple(self.target.shape) != self.shape:
            yield self
            return
        step = max(1, size // max(1, math.prod(others)))
        for at in range(0, rows, step):
            yield replace(self, target=self.target[at : at + step], dim=0, start=self.start + at)


class Block:
    """What is made of blocks, which are its attributes, or in tuples there; those without any have
    weights of their own."""

    matrices: tuple[str, ...] = ()  # the attributes of its own that may be held in codes

    def blocks(self) -> list["Block"]:
        """Each once, though a head may be the embedding too."""
        values = (v if isinstance(v, tuple) else (v,) for v in vars(self).values())
        return [*dict.fromkeys(part for v in values for part in v if isinstance(part, Block))]

    def weights(self) -> Iterator[Weight]:
        """Every weight of this rank, by its name in a checkpoint of the Llama convention."""
        for block in self.blocks():
            yield from block.weights()

    def pack(self) -> None:
        """Put the weights of products into the form that their device reads fastest, once all are
        filled; `weights` has nothing to fill any more."""
        for block in self.blocks():
            block.pack()

    def forms(self) -> Forms:
        """How its matrices, in their order, are held on a GPU: None for floats."""
        held = (vars(block)[name] for block, name in self.all_matrices())
        return tuple(w.form if isinstance(w, GroupedBlocks) else None for w in held)

    def take_forms(self, forms: Forms) -> None:
        """Hold its matrices so, their content any: what `forms` of one like it has given."""
        for (block, name), form in zip(self.all_matrices(), forms, strict=True):
            if form is not None:
                vars(block)[name] = empty(form, vars(block)[name])

    def all_matrices(self) -> Iterator[tuple["Block", str]]:
        """Those of all its blocks, itself included: the block, and the attribute's name."""
        yield from ((self, name) for name in self.matrices)
        for block in self.blocks():
            yield from block.all_matrices()

    def tensors(self) -> Iterator[torch.Tensor]:
        """What is held in memory; what blocks share more than once."""
        for value in vars(self).values():
            yield from tensors(value)
        for block in self.blocks():
            yield from block.tensors()
