"""Named ranges of time, for profilers: NVTX (domain "minisgl") or whatever a thread records with.

Coarse ranges are the parts of a step: step, plan, dispatch, begin, patch, forward, sample, collect,
update. Details are layers, ops and collectives, and exist only in a thread that was given a
recorder. Without one and without an attached tool a range is one shared object that does nothing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Range = AbstractContextManager[Any]
Recorder = Callable[[str], Range]

NOTHING: Range = nullcontext()
# A context is a thread's own: engines of one process do not record for each other.
_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@cache
def nvtx_range(name: str) -> Range:
    """A reusable NVTX range, or one that does nothing where no tool is attached (to a process it
    attaches at start)."""
    try:
        import nvtx
    except ModuleNotFoundError:  # only ranges need it
        return NOTHING
    attached = isinstance(nvtx.get_domain("minisgl"), nvtx.Domain)
    return nvtx.annotate(name, domain="minisgl") if attached else NOTHING


def span(name: str) -> Range:
    """The range of a part of a step."""
    record = _recorder.get()
    return nvtx_range(name) if record is None else record(name)


def detailed() -> bool:
    """Whether this thread records details."""
    return _recorder.get() is not None


def detail(name: str) -> Range:
    """The range of a layer or an op."""
    record = _recorder.get()
    return NOTHING if record is None else record(name)


def ranged(name: str, *, is_detail: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function each of whose calls is a part of a step, or a detail of one."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if is_detail and not detailed():
                return function(*args, **kwargs)
            with span(name):
                return function(*args, **kwargs)

        return call

    return decorate


def record_with(recorder: Recorder | None) -> None:
    """Have this thread's ranges, details too, recorded by `recorder`; None: coarse NVTX only."""
    _recorder.set(recorder)


def record_details() -> None:
    """Have this thread's details recorded by NVTX too, if a tool is attached."""
    record_with(None if nvtx_range("step") is NOTHING else nvtx_range)
