"""The op card: one operation, its specification, its implementations, its cases and its cost.

Tests, micro-benchmarks and the compile gate go through all cards, and what serving launches is
found by serving, so that a new kernel needs one new folder and nothing else. An implementation is
named by an import path and loaded when first chosen, so that a CPU process never imports Triton.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from minisgl.device.tape import by_call, recording
from minisgl.kernels.config import capability
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


WIDE = ("load128", "store128")


@dataclass(frozen=True)
class Expected:
    """Instructions (named as in `tools.machine_code`) that the code of a kernel must show.

    where: in which variants of it, by `Variant.facts`; wgmma is expected on Hopper only.
    """

    kernel: str
    instructions: tuple[str, ...]
    where: Callable[[Mapping[str, Any]], bool] = lambda facts: True


def serves_all(**arguments: Any) -> None:
    """Refuses nothing."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op. `path` is "module:function"; the reference's is empty.

    refusal: why it cannot compute a call with these arguments, if it serves a part of its op only;
    the call raises ValueError with the same words.
    """

    name: str
    device: str  # torch device type it runs on
    path: str
    capability: tuple[int, int] | None = None  # of the CUDA devices it runs on, if not of all
    refusal: Callable[..., str | None] = serves_all

    def supports(self, device: torch.device) -> bool:
        """A "meta" tensor stands for one on the GPU that launchers configure for."""
        kind = "cuda" if device.type == "meta" else device.type
        if kind != self.device or self.capability is None:
            return bool(kind == self.device)
        return divmod(capability(device), 10) == self.capability


@dataclass(eq=False)
class Op:
    """An op card. Calling it runs the implementation that fits the first tensor's device.

    `implementations` stand in order of preference; the first that supports the device is chosen,
    once per device. There is no silent fallback: a device nothing supports is an error. The
    reference is the specification in plain PyTorch, and the implementation on CPU unless another
    is listed for it. `variants` are calls, by implementation, that serving does not make, and that
    the compile gate therefore makes; `expected` is what it looks for in the op's own kernels.
    """

    name: str
    reference: Callable[..., Any]
    implementations: Sequence[Implementation] = ()
    cases: Sequence[Case] = ()
    cost: Callable[..., Cost] | None = None
    variants: Mapping[str, Sequence[Case]] = field(default_factory=dict)
    expected: Sequence[Expected] = ()
    _chosen: dict[torch.device, Callable[..., Any]] = field(default_factory=dict, repr=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not recording():
            return self._call(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # it reads values in what is `by_call` alone
            return self._call(*args, **kwargs)

    def _call(self, first: torch.Tensor, /, *args: Any, **kwargs: Any) -> Any:
        forced = _forced.get()
        function = self._chosen.get(first.device)
        if forced is not None and self.name in forced:
            function = self.implementation(forced[self.name])
        elif function is None:
            function = self.choose(first.device)
            if first.device.type != "meta":  # which stands for one GPU now, for another later
                self._chosen[first.device] = function
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
            return self.implementation("reference")
        raise RuntimeError(f"op {self.name} has no implementation for {device}")

    def implementation(self, name: str) -> Callable[..., Any]:
        """The implementation called `name` ("reference" included). Raises KeyError if unknown."""
        if name == "reference":
            return by_call(self.reference)  # it may read its tensors on the host
        for implementation in self.implementations:
            if implementation.name == name:
                module, function = implementation.path.split(":")
                return getattr(importlib.import_module(module), function)  # type: ignore[no-any-return]
        known = ["reference", *(i.name for i in self.implementations)]
        raise KeyError(f"op {self.name} has implementations {known}, not {name!r}")


def all_ops() -> list[Op]:
    """The cards of all rooms of `minisgl.kernels`, by name."""
    found: dict[str, Op] = {}
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            room = importlib.import_module(f"{__package__}.{module.name}")
            found.update({card.name: card for card in vars(room).values() if isinstance(card, Op)})
    return [found[name] for name in sorted(found)]


@contextmanager
def forced(choices: Mapping[str, str]) -> Iterator[None]:
    """Within the context, run each op named in `choices` by the implementation named there."""
    token = _forced.set(choices)
    try:
        yield
    finally:
        _forced.reset(token)
