"""What a workload is: one op at one shape of one model, with what a user would pick instead."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from minisgl.kernels.op import Op
from minisgl.layers.mlp import MoeConfig
from minisgl.models.config import ModelConfig
from minisgl.models.presets import PRESETS

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
    inner: int  # of one expert where there are experts
    vocab: int
    moe: MoeConfig | None

    @classmethod
    def of(cls, name: str) -> "Shape":
        """Of one of `minisgl.models.presets`."""
        model = ModelConfig.from_dict(PRESETS[name.lower()], where=name)
        moe = model.layers[0].moe
        return cls(
            name,
            model.num_heads,
            model.num_kv_heads,
            model.head_dim,
            model.hidden_size,
            model.inner_size if moe is None else moe.inner_size,
            model.vocab_size,
            moe,
        )

    @property
    def kv_bytes(self) -> int:
        """Of one token in one layer, in 16 bits."""
        return 2 * self.kv_heads * self.head_dim * 2


LLAMA_8B = Shape.of("Llama-3.1-8B")
QWEN3_06B = Shape.of("Qwen3-0.6B")
QWEN3_8B = Shape.of("Qwen3-8B")
QWEN3_14B = Shape.of("Qwen3-14B")
QWEN3_32B = Shape.of("Qwen3-32B")
QWEN3_30B_A3B = Shape.of("Qwen3-30B-A3B")


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
