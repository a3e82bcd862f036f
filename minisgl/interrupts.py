"""Ctrl-C where it does no harm: books that several statements change are never half changed.

Python raises KeyboardInterrupt between any two of them. `held_back` keeps an interrupt until its
block ends, and `let_through` opens that block again where nothing is under way but waiting.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class _Held:
    """The signal handler inside `held_back`. `before` is the one outside."""

    def __init__(self, before: Callable[[int, FrameType | None], object]) -> None:
        self.before = before
        self.came: tuple[int, FrameType | None] | None = None
        self.is_open = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.is_open:
            self.is_open = False  # what cleans up after it is not interrupted again
            self.came = None
            self.before(number, frame)
        else:
            self.came = number, frame


@contextmanager
def held_back() -> Iterator[None]:
    """Interrupts that come inside wait for its end, or for a `let_through` inside.

    Only the main thread is ever interrupted, and only where SIGINT has a handler in Python:
    elsewhere, and inside another `held_back`, this does nothing.
    """
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not callable(before) or isinstance(before, _Held):
        yield
        return
    held = _Held(before)
    signal.signal(signal.SIGINT, held)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held.came is not None:
            before(*held.came)


@contextmanager
def let_through() -> Iterator[None]:
    """An interrupt comes through inside, one that was held back until now at once."""
    held = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not isinstance(held, _Held):
        yield
        return
    try:
        held.is_open = True
        if held.came is not None:
            held(*held.came)
        yield
    finally:
        held.is_open = False
