"""Check, time and compare the op cards on one device.

    python -m benchmarks.kernels                        # everything, on the GPU if there is one
    python -m benchmarks.kernels --op decode --device cuda
    python -m benchmarks.kernels --device cpu --out /tmp/kernels

Each result is first compared with an fp32 oracle; only what passes is timed (medians, caches cold),
beside what a user would pick instead, in the same run. What an implementation refuses or fails at
is said, and the rest goes on. Shares are of the copy and matmul rates measured at the start. A CPU
gets small shapes. The last line is JSON; with --out, kernels.json, kernels.md and two pictures are
written there.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import report
from benchmarks.kernels.check import WrongResult, check
from benchmarks.kernels.goals import goals
from benchmarks.kernels.timing import Ceilings, measure_ceilings, median_seconds
from benchmarks.kernels.workloads import Setting, Workload, workloads
from minisgl.kernels.op import Cost

Row = dict[str, Any]


def time_workload(
    workload: Workload, setting: Setting, repeats: int, without: Collection[str] = ()
) -> tuple[list[Row], list[str]]:
    """One row per implementation that runs on the device, the reference where none does; and what
    was wrong with those that have none."""
    op, device = workload.op, setting.device
    arguments = workload.make(setting)
    names = [i.name for i in op.implementations if i.supports(device)] or ["reference"]
    cost = op.cost(**arguments) if op.cost else Cost(0, 0)
    num_bytes = workload.num_bytes or cost.bytes
    others = {}
    for name, baseline in workload.rivals.items():
        try:
            call = baseline(arguments)
            if call is not None:
                others[name] = median_seconds(call, device, repeats)
        except RuntimeError as error:  # a backend that refuses the shape; ours are still timed
            print(f"  {op.name} {workload.label}: {name} does not run: {_first_line(error)}")
    rows: list[Row] = []
    wrong: list[str] = []
    for name in names:
        if name in without:
            continue
        try:
            error = check(workload, name, arguments)
            function = op.implementation(name)
            seconds = median_seconds(lambda f=function: f(**arguments), device, repeats)
        except ValueError as refusal:
            print(f"  {op.name} {workload.label}: {name} refuses, {_first_line(refusal)}")
            continue
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # a wrong result or launch; the others are still timed
            kind = "" if isinstance(failure, WrongResult) else f"{type(failure).__name__}, "
            wrong.append(f"{op.name} {workload.label}: {name}: {kind}{_first_line(failure)}")
            continue
        rows.append(
            {
                "op": op.name,
                "label": workload.label,
                "implementation": name,
                "seconds": seconds,
                "error": error,
                "bytes": num_bytes,
                "flops": cost.flops,
                "bytes_per_second": num_bytes / seconds,
                "flops_per_second": cost.flops / seconds,
                "baselines": others,
                "ratios": {other: time / seconds for other, time in others.items()},
                "tags": workload.tags,
            }
        )
    return rows, wrong


def describe(device: torch.device) -> dict[str, str]:
    """Where, when and at which commit a run was made."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    root = Path(__file__).parents[2]
    commit = subprocess.run(
        ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": name or platform.machine(),
        "commit": commit.stdout.strip() or "unknown",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
    }


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "benchmarks.kernels", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    known = sorted({workload.op.name for workload in workloads(small=True)})
    parser.add_argument("--op", nargs="+", choices=known, help="only these ops")
    parser.add_argument("--without", nargs="+", default=[], help="not these implementations")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="the GPU if there is one")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=20, help="calls a median is taken of")
    parser.add_argument("--out", type=Path, help="folder for the files")
    args = parser.parse_args(words)
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no CUDA device")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return args


def main() -> int:
    args = parse()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    ceilings = measure_ceilings(device, dtype, args.repeats)
    about = describe(device)
    title = f"{about['device']}, {args.dtype}, {about['date']}, commit {about['commit']}"
    print(
        f"{title}: copies {ceilings.bytes_per_second / 1e9:.0f} GB/s, "
        f"multiplies {ceilings.flops_per_second / 1e12:.2f} TFLOP/s"
    )
    rows, wrong = run(args, device, dtype)
    print("\n" + report.table(rows, ceilings))
    verdicts = []
    if device.type == "cuda":
        verdicts = [goal.verdict(rows, ceilings) for goal in goals(about["device"])]
        print("\n" + report.goal_table(verdicts))
    line = summary(args, about, ceilings, rows, verdicts, wrong)
    if args.out is not None:
        write(args.out, title, rows, ceilings, verdicts, line)
    print(line)
    return 1 if wrong else 0


def run(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype
) -> tuple[list[Row], list[str]]:
    """The rows of all workloads asked for, and what was wrong with those that have none."""
    rows: list[Row] = []
    wrong: list[str] = []
    for workload in workloads(small=device.type == "cpu"):
        if args.op and workload.op.name not in args.op:
            continue
        generator = torch.Generator(device).manual_seed(0)
        try:
            timed, failed = time_workload(
                workload, Setting(device, dtype, generator), args.repeats, args.without
            )
        except torch.OutOfMemoryError as error:
            print(f"  {workload.op.name} {workload.label}: left out, {_first_line(error)}")
            continue
        rows += timed
        wrong += failed
        for text in failed:
            print(f"  WRONG: {text}", file=sys.stderr)
    return rows, wrong


def summary(
    args: argparse.Namespace,
    about: dict[str, str],
    ceilings: Ceilings,
    rows: list[Row],
    verdicts: list[Row],
    wrong: list[str],
) -> str:
    content = {
        "benchmark": "kernels",
        **about,
        "dtype": args.dtype,
        "copy_bytes_per_second": ceilings.bytes_per_second,
        "matmul_flops_per_second": ceilings.flops_per_second,
        "rows": rows,
        "goals": verdicts,
        "wrong": wrong,
    }
    return json.dumps(content)


def write(
    folder: Path,
    title: str,
    rows: list[Row],
    ceilings: Ceilings,
    verdicts: list[Row],
    line: str,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_text(line + "\n")
    parts = [f"# Kernels on {title}", report.table(rows, ceilings)]
    if verdicts:
        parts.append(report.goal_table(verdicts))
    (folder / "kernels.md").write_text("\n\n".join(parts) + "\n")
    if rows:
        report.plot(rows, ceilings, title, folder)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
