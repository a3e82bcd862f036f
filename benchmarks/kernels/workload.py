"""What a workload is: one op at one shape of one model, with what a user would pick instead."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from minisgl.kernels.op import Op

Arguments = dict[str, Any]
Make = Callable[["Setting"], Arguments]
Call = Callable[[], Any]
Baseline = Callable[[Arguments], Call | None]


@dataclass(frozen=True)
class Shape:
    """The facts of a model that its kernels see."""

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    vocab: int

    @property
    def kv_bytes(self) -> int:
        """Of one token in one layer, in 16 bits."""
        return 2 * self.kv_heads * self.head_dim * 2


LLAMA_8B = Shape("Llama-3.1-8B", 32, 8, 128, 4096, 14336, 128256)
QWEN3_06B = Shape("Qwen3-0.6B", 16, 8, 128, 1024, 3072, 151936)
QWEN3_8B = Shape("Qwen3-8B", 32, 8, 128, 4096, 12288, 151936)
QWEN3_14B = Shape("Qwen3-14B", 40, 8, 128, 5120, 17408, 151936)
QWEN3_32B = Shape("Qwen3-32B", 64, 8, 128, 5120, 25600, 151936)
QWEN3_30B_A3B = Shape("Qwen3-30B-A3B", 32, 4, 128, 2048, 768, 151936)  # inner: of one expert
EXPERTS, EXPERTS_PER_TOKEN = 128, 8  # of Qwen3-30B-A3B


@dataclass(frozen=True)
class Setting:
    """Where and in which type arguments are made."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(
        self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        values = torch.empty(size, device=self.device, dtype=dtype or self.dtype)
        return values.normal_(0.0, scale, generator=self.generator)

    def integers(self, low: int, high: int, *size: int) -> torch.Tensor:
        """int32 in [low, high)."""
        values = torch.empty(size, device=self.device, dtype=torch.int32)
        return values.random_(low, high, generator=self.generator)

    def order(self, count: int) -> torch.Tensor:
        """A permutation of [0, count), int64."""
        return torch.randperm(count, generator=self.generator, device=self.device)


@dataclass(frozen=True)
class Workload:
    """One op at one shape. `tags` are numbers that goals are stated in."""

    op: Op
    label: str
    make: Make
    rivals: dict[str, Baseline] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)
    num_bytes: int | None = None  # where the card's cost formula cannot know
    # Where this is the cheapest workload that some goal reads: the rivals that it compares with.
    goal_rivals: tuple[str, ...] | None = None

    @property
    def title(self) -> str:
        return f"{self.op.name} {self.label}"
