"""Check, time and compare the op cards on one device.

    python -m benchmarks.kernels                        # everything, on the GPU if there is one
    python -m benchmarks.kernels --op decode --device cuda
    python -m benchmarks.kernels --device cpu --out /tmp/kernels

Each result is first compared with an fp32 oracle; only what passes is timed (medians, caches cold;
short calls within a graph, too), beside what a user would pick instead, in the same run. What an
implementation refuses or fails at is said, and the rest goes on. Shares are of the copy and matmul
rates measured at the start. A CPU gets small shapes. What goals read comes first, rivals last. The
last line is JSON; with --out, kernels.json and kernels.md grow there as rows come, and two pictures
are drawn at the end. --stand-ins plays a GPU on the CPU, each kernel by its specification, to try
the run itself.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import report
from benchmarks.kernels.goals import goals
from benchmarks.kernels.measure import (
    Found,
    Ways,
    compare,
    first_line,
    is_broken,
    measure,
    passes,
    stand_ins,
    ways_on,
)
from benchmarks.kernels.timing import Ceilings, Timer, measure_ceilings
from benchmarks.kernels.workload import Setting, Workload
from benchmarks.kernels.workloads import workloads
from benchmarks.results import Results, add_options, device_name, replace
from minisgl.kernels.op import Op


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "benchmarks.kernels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    known = sorted({workload.op.name for workload in workloads(small=True)})
    parser.add_argument("--op", nargs="+", choices=known, help="only these ops")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--only", nargs="+", help="only these implementations, and ops that have one")
    only.add_argument("--without", nargs="+", default=[], help="not these implementations")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="the GPU if there is one")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20, help="calls a median is taken of")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--end", type=float, help=argparse.SUPPRESS)  # by the monotonic clock
    parser.add_argument("--stand-ins", action="store_true", help="play a GPU")
    add_options(parser)
    args = parser.parse_args(words)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no CUDA device")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.stand_ins and args.device != "cpu":
        parser.error("--stand-ins plays a GPU on the CPU: it needs --device cpu, got cuda")
    return args


def chosen(args: argparse.Namespace) -> Ways:
    """The implementations that the options ask for."""
    ways: Ways = stand_ins if args.stand_ins else ways_on(torch.device(args.device))

    def wanted(op: Op) -> dict[str, Callable[..., Any]]:
        return {
            name: function
            for name, function in ways(op).items()
            if (args.only is None or name in args.only) and name not in args.without
        }

    return wanted


def main(words: list[str] | None = None) -> int:
    args = parse(words)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    results, ways = Results("kernels", args, resume=args.resume, end=args.end), chosen(args)
    timer = Timer(device, args.repeats, small=args.stand_ins)
    name = "stand-ins for a GPU" if args.stand_ins else device_name(args.device)
    if not args.resume:
        ceilings = measure_ceilings(timer, dtype, small=args.stand_ins)
        results.put(device=name, torch=torch.__version__, dtype=args.dtype, **vars(ceilings))
    ceilings = Ceilings(*(results.content[field.name] for field in fields(Ceilings)))
    title = f"{name}, {args.dtype}, {results.content['date']}, commit {results.content['commit']}"
    print(
        f"{title}: copies {ceilings.bytes_per_second / 1e9:.0f} GB/s, "
        f"multiplies {ceilings.flops_per_second / 1e12:.2f} TFLOP/s, "
        f"measures nothing as {ceilings.empty_seconds * 1e6:.1f} us"
    )
    before = [results.content.get(name, []) for name in ("rows", "wrong", "missing")]
    found, done = Found(*before), results.content.get("done", 0)
    listed = [w for w in workloads(small=device.type == "cpu") if ways(w.op)]
    if args.op:
        listed = [w for w in listed if w.op.name in args.op]
    own = {(w.op.name, way) for w in listed for way in ways(w.op)}
    on_gpu = device.type == "cuda" or args.stand_ins
    judged = [goal for goal in goals(name) if on_gpu and goal.is_of(own)]
    for number, (workload, rivals, itself) in enumerate(passes(listed)):
        if number < done:
            continue
        what = workload.title if itself else f"{workload.title}: rivals"
        if not results.is_late(what):
            results.put(doing=what, done=number + 1)
            setting = Setting(device, dtype, torch.Generator(device).manual_seed(0))
            found.add(run(workload, rivals, itself, found, setting, timer, ways))
        missing = [*found.wrong, *found.missing, *results.content["late"]]
        verdicts = [goal.verdict(found.rows, ceilings, missing) for goal in judged]
        results.put(rows=found.rows, goals=verdicts, wrong=found.wrong, missing=found.missing)
        write_tables(args.out, title, found, ceilings, verdicts)
        if found.broken:
            go_on_in_a_new_process(args, results)
    results.put(doing="")
    print("\n" + write_tables(args.out, title, found, ceilings, results.content.get("goals", [])))
    if args.out is not None and found.rows:
        report.plot(found.rows, ceilings, title, args.out)
    results.finish()
    return 1 if found.wrong else 0


def go_on_in_a_new_process(args: argparse.Namespace, results: Results) -> None:
    """After an error that stays with the process, as of an illegal address: with the next pass.

    RuntimeError where nothing is kept, so that there is nothing to go on with.
    """
    if args.out is None:
        raise RuntimeError("the device refuses everything; with --out the rest would be measured")
    print("  the device refuses this process: a new one goes on", flush=True)
    words = [sys.executable, "-m", "benchmarks.kernels", *sys.argv[1:]]
    if not args.resume:
        words += ["--resume", *([] if results.end is None else ["--end", repr(results.end)])]
    os.execv(sys.executable, words)


def run(
    workload: Workload,
    rivals: frozenset[str],
    own: bool,
    before: Found,
    setting: Setting,
    timer: Timer,
    ways: Ways,
) -> Found:
    """What a workload gives; the memory it took is given back."""
    found = Found()
    try:
        if own:
            found.add(measure(workload, setting, timer, ways))
        if rivals and not found.broken:
            rows = [*before.rows, *found.rows]
            found.add(compare(workload, rivals, rows, setting, timer, ways))
    except torch.OutOfMemoryError as error:
        found.missing.append(f"{workload.title}: {first_line(error)}")
    except Exception as error:  # making the arguments, even
        found.wrong.append(f"{workload.title}: {type(error).__name__}, {first_line(error)}")
        found.broken |= is_broken(timer)
    for text in found.missing:
        print(f"  {text}")
    for text in found.wrong:
        print(f"  WRONG: {text}", file=sys.stderr)
    if setting.device.type == "cuda" and not found.broken:
        torch.cuda.empty_cache()
    return found


def write_tables(
    out: Path | None, title: str, found: Found, ceilings: Ceilings, verdicts: list[dict[str, Any]]
) -> str:
    """The tables, which stand in `out`, too."""
    parts = [report.table(found.rows, ceilings)]
    if verdicts:
        parts.append(report.goal_table(verdicts))
    if out is not None:
        lists = ["\n".join(f"- {text}" for text in texts) for texts in (found.wrong, found.missing)]
        text = "\n\n".join(filter(None, (f"# Kernels on {title}", *parts, *lists)))
        replace(out / "kernels.md", text + "\n")
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
