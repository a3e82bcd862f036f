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
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels import report
from benchmarks.kernels.check import WrongResult, check
from benchmarks.kernels.goals import goals
from benchmarks.kernels.timing import Ceilings, measure_ceilings, median_seconds
from benchmarks.kernels.workload import Setting, Workload
from benchmarks.kernels.workloads import workloads
from minisgl.kernels.op import Cost

Row = dict[str, Any]


@dataclass
class Found:
    """Rows, and why workloads or implementations have none: "op shape: implementation: why"."""

    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)  # results and launches that must not be
    missing: list[str] = field(default_factory=list)  # what was refused, did not fit or came late

    def add(self, other: "Found") -> None:
        self.rows += other.rows
        self.wrong += other.wrong
        self.missing += other.missing


def time_workload(
    workload: Workload, setting: Setting, repeats: int, without: Collection[str] = ()
) -> Found:
    """One row per implementation that runs on the device, the reference where none does."""
    op, device, found = workload.op, setting.device, Found()
    arguments = workload.make(setting)
    names = [i.name for i in op.implementations if i.supports(device)] or ["reference"]
    cost = op.cost(**arguments) if op.cost else Cost(0, 0)
    num_bytes = workload.num_bytes or cost.bytes
    title = f"{op.name} {workload.label}"
    others = {}
    for name, baseline in workload.rivals.items():
        try:
            call = baseline(arguments)
            if call is not None:
                others[name] = median_seconds(call, device, repeats)
        except Exception as error:  # a backend that refuses the shape; ours are still timed
            found.missing.append(f"{title}: {name}: does not run, {_first_line(error)}")
        call = None  # and what it prepared
    for name in names:
        if name in without:
            continue
        try:
            error = check(workload, name, arguments)
            function = op.implementation(name)
            seconds = median_seconds(lambda f=function: f(**arguments), device, repeats)
        except ValueError as refusal:
            found.missing.append(f"{title}: {name}: refuses, {_first_line(refusal)}")
            continue
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # a wrong result or launch; the others are still timed
            kind = "" if isinstance(failure, WrongResult) else f"{type(failure).__name__}, "
            found.wrong.append(f"{title}: {name}: {kind}{_first_line(failure)}")
            continue
        found.rows.append(
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
    return found


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
    parser.add_argument("--seconds", type=float, help="begin no workload later than this")
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
        f"multiplies {ceilings.flops_per_second / 1e12:.2f} TFLOP/s, "
        f"measures nothing as {ceilings.empty_seconds * 1e6:.1f} us"
    )
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    found = Found()
    began = time.monotonic()
    for workload in workloads(small=device.type == "cpu"):
        if args.op and workload.op.name not in args.op:
            continue
        if args.seconds is not None and time.monotonic() - began > args.seconds:
            late = f"not begun within {args.seconds:g} s"
            found.missing.append(f"{workload.op.name} {workload.label}: {late}")
            continue
        found.add(run(workload, Setting(device, dtype, seeded(device)), args))
        if args.out is not None:  # a hang later on loses nothing
            (args.out / "kernels.json").write_text(summary(args, about, ceilings, found, []) + "\n")
    print("\n" + report.table(found.rows, ceilings))
    verdicts = []
    if device.type == "cuda":
        missing = [*found.wrong, *found.missing]
        verdicts = [goal.verdict(found.rows, ceilings, missing) for goal in goals(about["device"])]
        print("\n" + report.goal_table(verdicts))
    line = summary(args, about, ceilings, found, verdicts)
    if args.out is not None:
        write(args.out, title, found, ceilings, verdicts, line)
    print(line)
    return 1 if found.wrong else 0


def seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def run(workload: Workload, setting: Setting, args: argparse.Namespace) -> Found:
    """What a workload gives; the memory it took is given back."""
    found = Found()
    try:
        found = time_workload(workload, setting, args.repeats, args.without)
    except torch.OutOfMemoryError as error:
        found.missing.append(f"{workload.op.name} {workload.label}: {_first_line(error)}")
    for text in found.missing:
        print(f"  {text}")
    for text in found.wrong:
        print(f"  WRONG: {text}", file=sys.stderr)
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def summary(
    args: argparse.Namespace,
    about: dict[str, str],
    ceilings: Ceilings,
    found: Found,
    verdicts: list[Row],
) -> str:
    content = {
        "benchmark": "kernels",
        **about,
        "dtype": args.dtype,
        "copy_bytes_per_second": ceilings.bytes_per_second,
        "matmul_flops_per_second": ceilings.flops_per_second,
        "empty_seconds": ceilings.empty_seconds,
        "rows": found.rows,
        "goals": verdicts,
        "wrong": found.wrong,
        "missing": found.missing,
    }
    return json.dumps(content)


def write(
    folder: Path,
    title: str,
    found: Found,
    ceilings: Ceilings,
    verdicts: list[Row],
    line: str,
) -> None:
    (folder / "kernels.json").write_text(line + "\n")
    parts = [f"# Kernels on {title}", report.table(found.rows, ceilings)]
    if verdicts:
        parts.append(report.goal_table(verdicts))
    parts += ["\n".join(f"- {text}" for text in texts) for texts in (found.wrong, found.missing)]
    (folder / "kernels.md").write_text("\n\n".join(filter(None, parts)) + "\n")
    if found.rows:
        report.plot(found.rows, ceilings, title, folder)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
