"""Check, time and compare the op cards on one device.

    python -m benchmarks.kernels                        # everything, on the GPU if there is one
    python -m benchmarks.kernels --op decode --device cuda
    python -m benchmarks.kernels --device cpu --out /tmp/kernels

Each result is first compared with an fp32 oracle; only what passes is timed (medians, caches cold;
short calls within a graph, too), beside what a user would pick instead, in the same run. What an
implementation refuses or fails at is said, and the rest goes on. Shares are of the copy and matmul
rates measured at the start. A CPU gets small shapes. What goals read comes first, rivals last. The
last line is JSON; with --out, kernels.json grows there as rows come, and kernels.md and two
pictures are written at the end. --stand-ins plays a GPU on the
CPU, each kernel by its specification, to try the run itself.
"""

import argparse
import sys
from collections.abc import Callable
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
    measure,
    passes,
    stand_ins,
    ways_on,
)
from benchmarks.kernels.timing import Ceilings, Timer, measure_ceilings
from benchmarks.kernels.workload import Setting, Workload
from benchmarks.kernels.workloads import workloads
from benchmarks.results import Results, add_options, device_name
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
    results, ways = Results("kernels", args), chosen(args)
    timer = Timer(device, args.repeats, small=args.stand_ins)
    ceilings = measure_ceilings(timer, dtype, small=args.stand_ins)
    name = "stand-ins for a GPU" if args.stand_ins else device_name(args.device)
    title = f"{name}, {args.dtype}, {results.content['date']}, commit {results.content['commit']}"
    print(
        f"{title}: copies {ceilings.bytes_per_second / 1e9:.0f} GB/s, "
        f"multiplies {ceilings.flops_per_second / 1e12:.2f} TFLOP/s, "
        f"measures nothing as {ceilings.empty_seconds * 1e6:.1f} us"
    )
    results.put(
        device=name,
        torch=torch.__version__,
        dtype=args.dtype,
        copy_bytes_per_second=ceilings.bytes_per_second,
        matmul_flops_per_second=ceilings.flops_per_second,
        empty_seconds=ceilings.empty_seconds,
    )
    found = Found()
    listed = [w for w in workloads(small=device.type == "cpu") if ways(w.op)]
    if args.op:
        listed = [w for w in listed if w.op.name in args.op]
    ops = {w.op.name for w in listed} if device.type == "cuda" or args.stand_ins else set()
    judged = [goal for goal in goals(name) if goal.op in ops]

    def put() -> None:
        missing = [*found.wrong, *found.missing, *results.content["late"]]
        verdicts = [goal.verdict(found.rows, ceilings, missing) for goal in judged]
        results.put(rows=found.rows, goals=verdicts, wrong=found.wrong, missing=found.missing)

    for workload, rivals, own in passes(listed):
        what = workload.title if own else f"{workload.title}: rivals"
        if not results.is_late(what):
            setting = Setting(device, dtype, torch.Generator(device).manual_seed(0))
            found.add(run(workload, rivals, own, found, setting, timer, ways))
        put()
    put()
    show(args.out, title, found, ceilings, results.content["goals"])
    results.finish()
    return 1 if found.wrong else 0


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
        if rivals:
            rows = [*before.rows, *found.rows]
            found.add(compare(workload, rivals, rows, setting, timer, ways))
    except torch.OutOfMemoryError as error:
        found.missing.append(f"{workload.title}: {first_line(error)}")
    for text in found.missing:
        print(f"  {text}")
    for text in found.wrong:
        print(f"  WRONG: {text}", file=sys.stderr)
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def show(
    out: Path | None, title: str, found: Found, ceilings: Ceilings, verdicts: list[dict[str, Any]]
) -> None:
    """The tables; with `out` there, too, and the pictures where they can be drawn."""
    parts = [report.table(found.rows, ceilings)]
    if verdicts:
        parts.append(report.goal_table(verdicts))
    print("\n" + "\n\n".join(parts))
    if out is None:
        return
    parts.insert(0, f"# Kernels on {title}")
    parts += ["\n".join(f"- {text}" for text in texts) for texts in (found.wrong, found.missing)]
    (out / "kernels.md").write_text("\n\n".join(filter(None, parts)) + "\n")
    if found.rows:
        report.plot(found.rows, ceilings, title, out)


if __name__ == "__main__":
    sys.exit(main())
