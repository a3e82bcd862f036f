"""The instruction levels for which this CPU has native ops, as parameters of tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest

from minisgl import csrc


def levels() -> list[Any]:
    """Parameters; levels that this CPU has and does not use are thorough. Empty: no compiler."""
    if csrc.load("model_ops", wait=True) is None:
        return []
    best, *others = list(csrc.LEVELS)[list(csrc.LEVELS).index(csrc.cpu_level()) :]
    thorough = [pytest.param(level, marks=pytest.mark.thorough, id=level) for level in others]
    return [*thorough, pytest.param(best, id=best)]


@contextmanager
def at(level: str | None) -> Iterator[None]:
    """Within the context, ops are native ones of this level, or, for None, not native."""
    native = csrc.load("model_ops", arch=level, wait=True) if level else None
    assert (native.LEVEL if native else None) == level
    with patch.object(csrc, "load", lambda _: native):
        yield
