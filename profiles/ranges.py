"""What the engine's profiling ranges cost when nothing profiles, as a share of a step.

    python -m profiles.ranges [--batch N] [--shape qwen3-0.6b]

The ranges and checks of a decode step are counted by a recorder in both of the engine's threads,
one call of each is timed in a loop, and the steps are timed with nothing recording. A comparison
of steps with and without ranges would drown such a small share in noise. Prints a table, then one
JSON line.
"""

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable

from benchmarks import models
from benchmarks.steps import load, open_device, recorded
from minisgl import trace
from minisgl.step.executor import LocalExecutor
from profiles import workload

COARSE = {"step", "plan", "dispatch", "collect", "update", "begin", "patch", "forward", "sample"}
LOOPS = 20_000
TRIES = 5


def seconds_of(call: Callable[[], object]) -> float:
    """Of one call: the least of some means, the loop's own cost left in."""
    means = []
    for _ in range(TRIES):
        begin = time.perf_counter()
        for _ in range(LOOPS):
            call()
        means.append((time.perf_counter() - begin) / LOOPS)
    return min(means)


def enter(make: Callable[[str], trace.Range]) -> Callable[[], None]:
    def call() -> None:
        with make("name"):
            pass

    return call


def count(args: argparse.Namespace) -> tuple[Counter[str], float]:
    """Ranges of a steady decode step by kind, and the seconds of one with nothing recording."""
    names: list[str] = []

    def recorder(name: str) -> trace.Range:
        names.append(name)
        return trace.NOTHING

    seconds: list[float] = []
    with open_device(args.device) as device, models.chosen(args) as (model, load_format):
        config = workload.engine_config(args, model, load_format)
        _, worker = load(config, device)
        overlap = not config.disable_overlap_schedule
        engine, _ = recorded(LocalExecutor(worker), config, overlap=overlap)

        def record(with_: trace.Recorder | None) -> None:
            trace.record_with(with_)
            device.run(trace.record_with, with_)

        steps = workload.decoding(engine, args)
        next(steps)  # every request decodes now
        record(recorder)
        names.clear()
        for _ in range(args.steps // 2):
            next(steps)
        record(None)
        total = Counter(names)
        for _ in range(args.steps // 2):
            begin = time.perf_counter()
            next(steps)
            seconds.append(time.perf_counter() - begin)
        steps.close()
    kinds: Counter[str] = Counter()
    for name, times in total.items():
        each = round(times / (args.steps // 2))
        parts = min(each, 1) if name in COARSE else 0
        kinds["part"] += parts
        kinds["layer" if name.startswith("layer ") else "op"] += each - parts
    return kinds, statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    workload.add_options(parser)
    parser.set_defaults(steps=100)
    args = parser.parse_args()
    cost = {
        "part": seconds_of(enter(trace.span)),
        "layer": seconds_of(enter(trace.detail)),
        "op": seconds_of(trace.detailed),
    }
    print("one call, in ns: " + ", ".join(f"{k} {1e9 * v:.0f}" for k, v in cost.items()))
    kinds, step = count(args)
    ranges = sum(cost[kind] * number for kind, number in kinds.items())
    times = f"{1e6 * ranges:.1f} us of {1e3 * step:.2f} ms"
    print(f"a decode step of {args.batch}: {dict(kinds)}, {times}")
    print(f"share of a step: {ranges / step:.2%}")
    result = {"batch": args.batch, "ranges_us": 1e6 * ranges, "step_us": 1e6 * step}
    result |= {f"{kind}_ns": 1e9 * seconds for kind, seconds in cost.items()}
    print(json.dumps({"profile": "ranges", "share": ranges / step, **result, "count": kinds}))


if __name__ == "__main__":
    main()
