"""The op card: one operation, its specification, its implementations, its cases and its cost.

Tests, micro-benchmarks, the compile gate and warm-up go through all cards, so that a new kernel
needs one new folder and nothing else. An implementation is named by an import path and loaded when
first chosen, so that a CPU process never imports Triton.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from minisgl.trace import detail, detailed

_forced: ContextVar[Mapping[str, str] | None] = ContextVar("forced_implementations", default=None)


@dataclass(frozen=True)
class Cost:
    """What an ideal kernel moves and computes for one call."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Case:
    """One named set of arguments; `make` builds them on a device in a dtype, seeded."""

    label: str
    make: Callable[[torch.device, torch.dtype, torch.Generator], dict[str, Any]]


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op. `path` is "module:function"; the reference's is empty."""

    name: str
    device: str  # torch device type it runs on
    path: str
    capability: tuple[int, int] | None = None  # of the CUDA devices it runs on, if not of all

    def supports(self, device: torch.device) -> bool:
        if device.type != self.device or self.capability is None:
            return device.type == self.device
        return torch.cuda.get_device_capability(device) == self.capability


@dataclass(eq=False)
class Op:
    """An op card. Calling it runs the implementation that fits the first tensor's device.

    `implementations` stand in order of preference; the first that supports the device is chosen,
    once per device. There is no silent fallback: a device nothing supports is an error. The
    reference is the specification in plain PyTorch, and the implementation on CPU unless another
    is listed for it.
    """

    name: str
    reference: Callable[..., Any]
    implementations: Sequence[Implementation] = ()
    cases: Sequence[Case] = ()
    cost: Callable[..., Cost] | None = None
    _chosen: dict[torch.device, Callable[..., Any]] = field(default_factory=dict, repr=False)

    def __call__(self, first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        forced = _forced.get()
        function = self._chosen.get(first.device)
        if forced is not None and self.name in forced:
            function = self.implementation(forced[self.name])
        elif function is None:
            function = self._chosen[first.device] = self.choose(first.device)
        if detailed():
            with detail(self.name):
                return function(first, *args, **kwargs)
        return function(first, *args, **kwargs)

    def only(self, name: str) -> "Op":
        """This op with one implementation only, for callers that choose by more than the device."""
        chosen = [i for i in self.implementations if i.name == name]
        if not chosen:
            raise KeyError(f"op {self.name} has no implementation {name!r}")
        return replace(self, implementations=chosen, _chosen={})

    def choose(self, device: torch.device) -> Callable[..., Any]:
        """The preferred implementation for `device`. Raises RuntimeError when there is none."""
        for implementation in self.implementations:
            if implementation.supports(device):
                return self.implementation(implementation.name)
        if device.type == "cpu":
            return self.reference
        raise RuntimeError(f"op {self.name} has no implementation for {device}")

    def implementation(self, name: str) -> Callable[..., Any]:
        """The implementation called `name` ("reference" included). Raises KeyError if unknown."""
        if name == "reference":
            return self.reference
        for implementation in self.implementations:
            if implementation.name == name:
                module, function = implementation.path.split(":")
                return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]
        known = ["reference", *(i.name for i in self.implementations)]
        raise KeyError(f"op {self.name} has implementations {known}, not {name!r}")


@contextmanager
def forced(choices: Mapping[str, str]) -> Iterator[None]:
    """Within the context, run each op named in `choices` by the implementation named there."""
    token = _forced.set(choices)
    try:
        yield
    finally:
        _forced.reset(token)
