"""Checks and times a workload's implementations; compares them with what a user would pick.

What goals read comes first, with the rivals that a goal compares with and no others; then the
other workloads; then all rivals, each beside our own kernel, which is timed again for it. A run
that is cut short has so measured what matters most.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.kernels.check import WrongResult, check
from benchmarks.kernels.timing import Timer
from benchmarks.kernels.workload import Arguments, Setting, Workload
from minisgl.kernels.op import Cost, Op

# A call that moves less is mostly launch: it is timed in a graph, too.
SHORT_BYTES = 8 * 2**20

Row = dict[str, Any]
Ways = Callable[[Op], dict[str, Callable[..., Any]]]  # the implementations to time, by name
Pass = tuple[Workload, frozenset[str], bool]  # its rivals, and whether it is timed for itself


@dataclass
class Found:
    """Rows, and why workloads or implementations have none: "op shape: implementation: why"."""

    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # results and launches that must not be
    missing: list[str] = field(default_factory=list)  # what was refused or did not fit
    broken: bool = False  # the device may be of no more use to this process

    def add(self, other: "Found") -> None:
        self.rows += other.rows
        self.wrong += other.wrong
        self.missing += other.missing
        self.broken |= other.broken


def passes(workloads: Iterable[Workload]) -> Iterator[Pass]:
    """What to measure, in the order of what a run that is cut short should have."""
    listed = list({w.title: w for w in workloads}.values())  # two models can have one width
    read = [w for w in listed if w.goal_rivals is not None]
    yield from ((w, frozenset(w.goal_rivals or ()), True) for w in read)
    yield from ((w, frozenset(), True) for w in listed if w.goal_rivals is None)
    for workload in listed:
        others = frozenset(workload.rivals) - frozenset(workload.goal_rivals or ())
        if others:
            yield workload, others, False


def ways_on(device: torch.device) -> Ways:
    """All implementations of an op that run on the device, the reference where none does."""

    def ways(op: Op) -> dict[str, Callable[..., Any]]:
        names = [i.name for i in op.implementations if i.supports(device)] or ["reference"]
        return {name: op.implementation(name) for name in names}

    return ways


def stand_ins(op: Op) -> dict[str, Callable[..., Any]]:
    """A GPU's implementations of an op, each played on a CPU by the op's specification."""
    return {i.name: op.reference for i in op.implementations if i.device == "cuda"}


def measure(workload: Workload, setting: Setting, timer: Timer, ways: Ways) -> Found:
    """One row for each implementation, checked and then timed."""
    op, found = workload.op, Found()
    arguments = workload.make(setting)
    cost = op.cost(**arguments) if op.cost else Cost(0, 0)
    num_bytes = workload.num_bytes or cost.bytes
    for name, function in ways(op).items():
        try:
            error = check(workload, function, arguments)
            call = _bound(function, arguments)
            seconds = timer.seconds(call)
        except ValueError as refusal:
            found.missing.append(f"{workload.title}: {name}: refuses, {first_line(refusal)}")
            continue
        except torch.OutOfMemoryError as error:
            found.missing.append(f"{workload.title}: {name}: {first_line(error)}")
            continue
        except Exception as failure:  # a wrong result or launch; the others are still timed
            kind = "" if isinstance(failure, WrongResult) else f"{type(failure).__name__}, "
            found.wrong.append(f"{workload.title}: {name}: {kind}{first_line(failure)}")
            found.broken |= is_broken(timer)
            continue
        launch_seen, short = timer.launch_seen, None
        if num_bytes <= SHORT_BYTES:
            try:
                short = timer.graph_seconds(call)
            except Exception as failure:  # it waits for the device, say; its own time is there
                text = f"{workload.title}: {name}: not in a graph, {first_line(failure)}"
                found.missing.append(text)
                found.broken |= setting.device.type == "cuda"  # a failed capture may last
        found.rows.append(
            {
                "op": op.name,
                "label": workload.label,
                "implementation": name,
                "seconds": seconds,
                "graph_seconds": short,
                "launch_seen": launch_seen,
                "error": error,
                "bytes": num_bytes,
                "flops": cost.flops,
                "bytes_per_second": num_bytes / seconds,
                "flops_per_second": cost.flops / seconds,
                "baselines": {},
                "ratios": {},
                "tags": workload.tags,
            }
        )
    return found


def compare(
    workload: Workload,
    rivals: Iterable[str],
    rows: Iterable[Row],
    setting: Setting,
    timer: Timer,
    ways: Ways,
) -> Found:
    """Adds to the workload's rows what its `rivals` take, beside our own kernels timed again."""
    found = Found()
    own = {
        row["implementation"]: row
        for row in rows
        if (row["op"], row["label"]) == (workload.op.name, workload.label)
    }
    functions = {name: f for name, f in ways(workload.op).items() if name in own}
    if not functions:
        return found
    arguments = workload.make(setting)
    for rival in (name for name in workload.rivals if name in rivals):
        try:
            call = workload.rivals[rival](arguments)
            if call is None:
                continue
            theirs = timer.seconds(call)
        except Exception as error:  # a backend that refuses the shape
            text = f"{workload.title}: {rival}: does not run, {first_line(error)}"
            found.missing.append(text)
            found.broken |= is_broken(timer)
            if found.broken:
                break
            continue
        call = None  # and what it prepared
        for name, function in functions.items():
            ours = timer.seconds(_bound(function, arguments))
            own[name]["baselines"][rival] = theirs
            own[name]["ratios"][rival] = theirs / ours
    return found


def is_broken(timer: Timer) -> bool:
    """Whether the device refuses everything from now on, as after an illegal address."""
    try:
        timer.clock.wait()
    except Exception:
        return True
    return False


def _bound(function: Callable[..., Any], arguments: Arguments) -> Callable[[], object]:
    return lambda: function(**arguments)


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
