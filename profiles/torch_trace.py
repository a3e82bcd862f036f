"""A torch-profiler trace as tables: which ops and kernels take the time, how long the GPU idles.

    python -m profiles.torch_trace --shape qwen3-0.6b --batch 16
    python -m profiles.torch_trace --file PROFILE_DIR/20261121-093000/rank0.trace.json.gz

Ops are the engine's own, timed on the thread that runs them: on a CPU that is the work, on a GPU
the launching of it. Kernels and the idle share exist where the trace has a GPU in it. The last
line is JSON.
"""

import argparse
import gzip
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.intervals import idle_share
from profiles import workload

ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}
Event = dict[str, Any]
Row = tuple[str, int, float]  # name, calls, total microseconds


def read(file: Path) -> list[Event]:
    """The complete events of a trace. ValueError when the file is none."""
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            content = gzip.decompress(content)
        events = json.loads(content)["traceEvents"]
        return [event for event in events if event.get("ph") == "X" and "cat" in event]
    except (ValueError, LookupError, TypeError, EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file} is not a trace: {error!r}") from error


def totals(events: Sequence[Event], categories: set[str]) -> list[Row]:
    """Calls and time by name, the longest first. Nested ranges count for themselves too."""
    found: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event["cat"] in categories:
            found[event["name"]].append(event["dur"])
    rows = [(name, len(times), sum(times)) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def gpu_idle(events: Sequence[Event]) -> float | None:
    """Share of the time from the first GPU activity to the last in which there is none."""
    busy = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["cat"] in ON_GPU]
    return idle_share(busy) if busy else None


def show(title: str, rows: Sequence[Row], limit: int) -> None:
    if not rows:
        return
    print(f"\n{title:60} {'calls':>7} {'total us':>12} {'us/call':>9}")
    for name, calls, time in rows[:limit]:
        print(f"{name[:60]:60} {calls:>7} {time:>12.0f} {time / calls:>9.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    workload.add_options(parser)
    parser.add_argument("--file", type=Path, help="a trace to read instead of making one")
    parser.add_argument("--top", type=int, default=20, help="lines of each table")
    parser.add_argument("--out", type=Path, default=Path("profiles/out"), help="folder of files")
    args = parser.parse_args()
    if args.dry_run:
        print(f"read {args.file}" if args.file else f"trace {args.steps} steps into {args.out}")
        return
    file = args.file
    if file is None:
        file = workload.profile(args, args.out, traces=True) / "rank0.trace.json.gz"
    events = read(file)
    ops, kernels = totals(events, {"user_annotation"}), totals(events, ON_GPU)
    idle = gpu_idle(events)
    show("ranges of the engine", ops, args.top)
    show("on the GPU", kernels, args.top)
    print(f"\nGPU idle: {'no GPU in this trace' if idle is None else f'{idle:.1%}'}")
    print(f"trace: {file} (open it at https://ui.perfetto.dev)")
    result: dict[str, Any] = {"profile": "torch_trace", "file": str(file), "gpu_idle_share": idle}
    result |= {"ops": {name: round(time) for name, _, time in ops[: args.top]}}
    result |= {"kernels": {name: round(time) for name, _, time in kernels[: args.top]}}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
