"""A check on a GPU machine: named stages, each bounded in time, that lose nothing when cut.

    benchmarks/gpu_check.sh --group kernels --commit abc1234    # a group: under nine minutes
    benchmarks/gpu_check.sh --group engine --commit abc1234     # then the next one
    benchmarks/gpu_check.sh hopper decode                       # these stages, again
    benchmarks/gpu_check.sh                                     # all that has not passed yet
    benchmarks/gpu_check.sh --device cpu --stand-ins            # a dry run on any machine

A stage that fails, runs out of time or lacks a package says so, and the next one runs. Every stage
has a folder in --out with its whole output (log.txt) and its figures, which are written as they
come; check.json and check.md there say how each stage ended. What has passed at this commit is not
run again unless it is named. When a stage that once passed is run again, what it found then stays
in STAGE.before until it passes again. --wheels names a folder with wheels of packages that this
machine lacks. benchmarks/README.md walks through the stages.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu_stages import GROUPS, SHARE, STAGES, Stage
from benchmarks.kernels.report import goal_table
from benchmarks.results import ROOT, commit, device_name, replace, today

TAIL = 4000  # characters of a failed stage's output that the report shows
UNKNOWN = "unknown"  # the commit, where nobody has said it
PLAIN = (int, float, str)

Record = dict[str, Any]


def run_stage(stage: Stage, seconds: int, folder: Path, args: argparse.Namespace) -> Record:
    """Runs one stage to its end or its limit; never raises for what the stage does.

    What it prints and writes is in `folder` while it runs, whoever ends it or this process.
    """
    words = stage.command(
        stand_ins=args.stand_ins,
        device=args.device,
        out=folder,
        seconds=round(SHARE * seconds),
        commit=args.commit,
    )
    print(f"==> {stage.name}, at most {seconds} s: {' '.join(words)}", flush=True)
    began = time.monotonic()
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=args.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it starts ends with it
        )
        try:
            code = process.wait(timeout=seconds)
            state, reason = ("passed", "") if code == 0 else ("failed", f"exit status {code}")
        except subprocess.TimeoutExpired:
            state, reason = "cut", f"not done after {seconds} s"
        finally:
            _end(process)
    late = [what for _, content in figures(folder) for what in content.get("late", ())]
    if state == "passed" and late:
        state, reason = "in part", f"not begun in time: {', '.join(late)}"
    return {"state": state, "reason": reason, "seconds": round(time.monotonic() - began, 1)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the stage and everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def missing_packages(stage: Stage, environment: dict[str, str]) -> list[str]:
    """Those of the packages the stage needs that neither this Python nor PYTHONPATH has."""
    folders = [Path(f) for f in environment.get("PYTHONPATH", "").split(os.pathsep) if f]
    return [
        name
        for name in stage.needs
        if not any((folder / name).is_dir() for folder in folders)
        and importlib.util.find_spec(name) is None
    ]


def figures(folder: Path) -> Iterator[tuple[str, Record]]:
    """The figures that a stage has left in its folder, by file name."""
    for path in sorted(folder.glob("*.json")):
        yield path.name, json.loads(path.read_text())


def install(wheels: Path, target: Path, environment: dict[str, str]) -> None:
    """Unpacks the wheels of a folder beside the tree. Raises CalledProcessError."""
    files = sorted(str(path) for path in wheels.glob("*.whl"))
    if not files:
        raise SystemExit(f"--wheels {wheels}: no *.whl there")
    words = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([sys.executable, *words, *files], check=True)
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (environment.get("PYTHONPATH"), str(target)))
    )


def about(args: argparse.Namespace) -> dict[str, str]:
    """The machine, the commit and the day. Ends the check where there is no such device."""
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda, but torch finds no CUDA device")
    return {
        "device": "stand-ins for a GPU" if args.stand_ins else device_name(args.device),
        "commit": args.commit,
        "date": today(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# ---- the report -------------------------------------------------------------------------------


def markdown(result: Record, out: Path) -> str:
    """How every stage ended, then what each found."""
    said = result["about"]
    lines = [
        f"# Check on {said['device']}",
        f"Commit {said['commit']}, {said['date']}, torch {said['torch']}, Python {said['python']}.",
        "| stage | state | seconds | commit | |\n|---|---|---:|---|---|",
    ]
    stages = result["stages"]
    for name, record in stages.items():
        before = record.get("passed_before")
        kept = "" if before is None else f"; passed at {before['commit']}, see {name}.before"
        lines[-1] += (
            f"\n| {name} | {record['state']} | {record.get('seconds', '')} "
            f"| {record['commit']} | {record['reason']}{kept} |"
        )
    for name, record in stages.items():
        for _, content in figures(out / name):
            lines += show(name, content)
        log = out / name / "log.txt"
        if record["state"] in ("failed", "cut") and log.exists():
            text = log.read_text(errors="replace")[-TAIL:].strip()
            lines.append(f"## {name}: end of its output\n\n```\n{text}\n```")
    return "\n\n".join(lines) + "\n"


def show(name: str, content: Record) -> list[str]:
    """A stage's plain figures, its rows and its goals."""
    plain = {k: v for k, v in content.items() if isinstance(v, PLAIN)}
    lines = [f"## {name}\n\n" + "\n".join(f"- {k}: {v}" for k, v in plain.items())]
    rows = [(k, v) for k, v in content.items() if k in ("rows", "mixed") and v]
    if content["benchmark"] == "tests":
        rows = [("rows", [row for row in content["rows"] if row["outcome"] != "passed"])]
    if content["benchmark"] != "kernels":  # whose own tables stand in kernels.md
        lines += [table(own) for _, own in rows if own]
    if content.get("goals"):
        lines.append(goal_table(content["goals"]))
    return lines


def table(rows: list[Record]) -> str:
    """Rows as Markdown, of what is no list or record itself; the columns are the first row's."""
    names = [name for name, value in rows[0].items() if value is None or isinstance(value, PLAIN)]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        cells = [str(row.get(name, "")).replace("|", "\\|").split("\n")[-1] for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def save(result: Record, out: Path) -> None:
    """Replaces both files at once, so that a run cut short leaves whole ones."""
    replace(out / "check.json", json.dumps(result, indent=1) + "\n")
    replace(out / "check.md", markdown(result, out))


# ---- the run ----------------------------------------------------------------------------------


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "gpu_check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(names)}")
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=[])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/latest")
    parser.add_argument("--commit", help="of this tree; default: what git says, if it is there")
    parser.add_argument("--seconds", type=int, help="for each stage, instead of its own limit")
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--stand-ins", action="store_true", help="small sizes, a CPU plays the GPU")
    args = parser.parse_args(words)
    for name in args.stages:
        if name not in names:
            parser.error(f"stage must be one of {names}, got {name!r}")
    if args.stand_ins != (args.device == "cpu"):
        parser.error("stages are sized for a GPU: --device cpu needs --stand-ins, and they need it")
    if args.seconds is not None and args.seconds < 1:
        parser.error(f"--seconds must be at least 1, got {args.seconds}")
    args.out = args.out.resolve()
    args.commit = commit(args.commit)
    args.environment = dict(os.environ)
    return args


def chosen(args: argparse.Namespace, stages: dict[str, Record]) -> Iterator[Stage]:
    """The stages to run: those named, or those of the groups that have not passed yet."""
    for stage in STAGES:
        if args.stages:
            if stage.name in args.stages:
                yield stage
            continue
        if args.group and stage.group not in args.group:
            continue
        before = stages.get(stage.name, {})
        known = args.commit != UNKNOWN and before.get("commit") == args.commit
        if known and before.get("state") == "passed":
            print(f"==> {stage.name}: has passed at {args.commit}", flush=True)
        else:
            yield stage


def check(stage: Stage, args: argparse.Namespace, result: Record) -> None:
    """Runs a stage and records it. While it runs the record says so, should this process end."""
    stages, folder = result["stages"], args.out / stage.name
    before = stages.get(stage.name, {})
    record = {name: result["about"][name] for name in ("commit", "date", "device")}
    missing = missing_packages(stage, args.environment)
    if missing:
        record |= {"state": "left out", "reason": f"not installed: {', '.join(missing)}"}
        if before.get("state") not in (None, "left out"):
            print(f"==> {stage.name}: {record['reason']}; what it found before stays", flush=True)
            return
    passed = before if before.get("state") == "passed" else before.get("passed_before")
    if passed is not None:
        record["passed_before"] = {k: passed[k] for k in ("commit", "date", "device", "seconds")}
    if not missing:
        kept = folder.with_name(f"{stage.name}.before")
        if before.get("state") == "passed":
            shutil.rmtree(kept, ignore_errors=True)
            folder.rename(kept)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        running = {"state": "cut", "reason": "the check ended while it ran"}
        stages[stage.name] = record | running
        save(result, args.out)
        record |= run_stage(stage, args.seconds or stage.seconds, folder, args)
        if record["state"] == "passed":
            shutil.rmtree(kept, ignore_errors=True)
            record.pop("passed_before", None)
    stages[stage.name] = record
    print(f"==> {stage.name}: {record['state']} {record['reason']}", flush=True)
    save(result, args.out)


def main(words: Sequence[str] | None = None) -> int:
    args = parse(words)
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if args.wheels is not None:
            install(args.wheels, Path(folder), args.environment)
            sys.path.append(folder)
        path = args.out / "check.json"
        stages = json.loads(path.read_text())["stages"] if path.exists() else {}
        result = {"about": about(args), "stages": stages}
        if args.commit == UNKNOWN:
            print("no --commit given and none found: every stage is run again")
        ran = []
        for stage in chosen(args, stages):
            check(stage, args, result)
            ran.append(stage.name)
    save(result, args.out)
    print(markdown(result, args.out))
    return 1 if any(stages[name]["state"] in ("failed", "cut") for name in ran) else 0


if __name__ == "__main__":
    sys.exit(main())
