"""What lives: the processes that a process has started."""

import contextlib
import os
from pathlib import Path


def children(parent: int | None = None) -> set[int]:
    """Living processes that `parent`, this process by default, has started."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        state, started_by = _state(stat)
        if started_by == (parent or os.getpid()) and state != "Z":
            found.add(int(stat.parent.name))
    return found


def of_session(leader: int) -> set[int]:
    """Living processes of the session that `leader` began."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.add(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    return _state(Path(f"/proc/{pid}/stat"))[0] not in ("Z", "")


def _state(stat: Path) -> tuple[str, int]:
    """State and parent; "" of what has ended."""
    with contextlib.suppress(OSError):
        state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        return state, int(parent)
    return "", 0
