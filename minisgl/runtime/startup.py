"""What a start takes: the seconds of its stages, and how it ends with nothing left to compile."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stages:
    """Seconds of each stage, in the order they began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs within; a stage that comes again adds up."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def table(self) -> str:
        """One line per stage, for the log."""
        lines = [f"  {name:<16} {seconds:>8.2f} s" for name, seconds in self.seconds.items()]
        return "\n".join(
            ["start-up:", *lines, f"  {'total':<16} {sum(self.seconds.values()):>8.2f} s"]
        )
