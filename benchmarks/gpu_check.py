"""A check on a GPU machine: named stages, each bounded in time, that lose nothing when cut.

    benchmarks/gpu_check.sh --group kernels --commit abc1234    # a group: under nine minutes
    benchmarks/gpu_check.sh --group engine --commit abc1234     # then the next one
    benchmarks/gpu_check.sh hopper decode                       # these stages, again
    benchmarks/gpu_check.sh                                     # all that has not passed yet
    benchmarks/gpu_check.sh --device cpu --stand-ins            # a dry run on any machine

A stage that fails, runs out of time or lacks a package says so, and the next one runs. Every stage
has a folder in --out with its whole output (log.txt) and its figures, which are written as they
come; check.json and check.md there say how each stage ended. What has passed on this device at this
commit is not run again unless it is named. The best that earlier runs of a stage found stays in
STAGE.before until it passes. --archive FILE packs all of it in one file after every stage.
--wheels names a folder with wheels of packages that this machine lacks. benchmarks/README.md walks
through the stages.
"""

import argparse
import contextlib
import ctypes
import fcntl
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu_report import Record, figures, markdown, summary
from benchmarks.gpu_stages import GROUPS, SHARE, STAGES, Stage
from benchmarks.results import ROOT, commit, device_name, replace, today

SHOWN = 3  # of a list, in one line
PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


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
            preexec_fn=_end_with_parent,
        )
        try:
            code = process.wait(timeout=seconds)
            state, reason = ("passed", "") if code == 0 else ("failed", f"exit status {code}")
        except subprocess.TimeoutExpired:
            state, reason = "cut", f"not done after {seconds} s"
        finally:
            _end(process)
    late = [what for content in figures(folder) for what in content.get("late", ())]
    if late:
        state = "in part" if state == "passed" else state
        others = f" and {len(late) - SHOWN} more" if len(late) > SHOWN else ""
        begun = f"not begun in time: {', '.join(late[:SHOWN])}{others}"
        reason = "; ".join(filter(None, (reason, begun)))
    return {"state": state, "reason": reason, "seconds": round(time.monotonic() - began, 1)}


def _end_with_parent() -> None:
    """In a stage's process, before it begins: Linux ends it when the check is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


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


def weight(record: Record, folder: Path) -> tuple[bool, int]:
    """How much an earlier run of a stage is worth: whether it passed, how many rows are good."""
    rows = [
        row
        for content in figures(folder)
        for name in ("rows", "mixed")
        for row in content.get(name, ())
        if row.get("outcome", "passed") == "passed"
    ]
    return record.get("state") == "passed", len(rows)


def install(wheels: Path, target: Path, environment: dict[str, str]) -> None:
    """Unpacks the wheels of a folder beside the tree: a wheel is a zip file, and pip is not needed.

    Ends the check for what is none.
    """
    files = sorted(wheels.glob("*.whl"))
    if not files:
        raise SystemExit(
            f"--wheels {wheels}: {'no *.whl there' if wheels.is_dir() else 'no folder'}"
        )
    for file in files:
        try:
            with zipfile.ZipFile(file) as wheel:
                wheel.extractall(target)
        except (zipfile.BadZipFile, OSError) as error:
            raise SystemExit(f"--wheels: {file.name} cannot be unpacked: {error}") from None
    paths = (environment.get("PYTHONPATH"), str(target))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


def about(args: argparse.Namespace) -> dict[str, str]:
    """The machine, the commit and the day. Ends the check where there is no such device."""
    if importlib.util.find_spec("torch") is None:
        raise SystemExit(f"{sys.executable} has no torch; PYTHON names another Python")
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


# ---- the record ------------------------------------------------------------------------------


def save_record(result: Record, args: argparse.Namespace) -> None:
    replace(args.out / "check.json", json.dumps(result, indent=1) + "\n")


def save(result: Record, args: argparse.Namespace) -> None:
    """Replaces each file at once, so that a run cut short leaves whole ones."""
    save_record(result, args)
    replace(args.out / "check.md", markdown(result, args.out))
    if args.archive is not None:
        fresh = args.archive.with_name(f"{args.archive.name}.part")
        with tarfile.open(fresh, "w:gz") as archive:
            archive.add(args.out, args.out.name)
        fresh.replace(args.archive)


def earlier(out: Path) -> dict[str, Record]:
    """What earlier runs recorded in `out`. Ends the check where that cannot be read."""
    path = out / "check.json"
    try:
        stages: dict[str, Record] = json.loads(path.read_text())["stages"] if path.exists() else {}
        for record in stages.values():
            _ = [record[name] for name in ("state", "reason", "commit", "device")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"{path} is not what a check writes ({error}): move it away") from None
    return stages


# ---- the run ----------------------------------------------------------------------------------


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "gpu_check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(names)}")
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=[])
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/latest, or dry-run")
    parser.add_argument("--archive", type=Path, help="a .tar.gz of --out, made after every stage")
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
    name = "dry-run" if args.stand_ins else "latest"
    args.out = (args.out or ROOT / "benchmarks/results" / name).resolve()
    if args.archive is not None:
        args.archive = args.archive.resolve()
        if args.out in args.archive.parents:
            parser.error(f"--archive must not lie in --out, got {args.archive}")
        if args.archive.is_dir() or not args.archive.parent.is_dir():
            parser.error(f"--archive must be a file in a folder that is there, got {args.archive}")
    args.commit = commit(args.commit)
    if re.fullmatch(r"\w[\w.-]*", args.commit) is None:
        parser.error(f"--commit must be letters, digits, '_', '.' and '-', got {args.commit!r}")
    # Plugins of pytest that happen to be there are none of the check's.
    args.environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return args


def chosen(args: argparse.Namespace, result: Record) -> Iterator[Stage]:
    """The stages to run: those named, or those of the groups that have not passed yet."""
    here, vague = result["about"], is_vague(args.commit)
    for stage in STAGES:
        if args.stages:
            if stage.name in args.stages:
                yield stage
            continue
        if args.group and stage.group not in args.group:
            continue
        before = result["stages"].get(stage.name, {})
        same = all(before.get(name) == here[name] for name in ("commit", "device"))
        if same and not vague and before.get("state") == "passed":
            print(f"==> {stage.name}: has passed here at {args.commit}", flush=True)
        else:
            yield stage


def is_vague(name: str) -> bool:
    """Whether two trees can have this commit's name."""
    return name == "unknown" or name.endswith("-dirty")


def check(stage: Stage, args: argparse.Namespace, result: Record) -> bool:
    """Runs a stage and records it; whether it was run, and not to a good end.

    While it runs the record says so, should this process end.
    """
    stages, folder = result["stages"], args.out / stage.name
    before = stages.get(stage.name, {})
    record = {name: result["about"][name] for name in ("commit", "date", "device")}
    missing = missing_packages(stage, args.environment)
    if missing:
        reason = f"not installed: {', '.join(missing)}"
        print(f"==> {stage.name}: left out, {reason}", flush=True)
        if not figures(folder):  # of what it found before the record stays
            stages[stage.name] = record | {"state": "left out", "reason": reason}
        save(result, args)
        return False
    kept, replaces = best(before, folder)
    if kept is not None:
        record["before"] = kept
    stages[stage.name] = record | {"state": "cut", "reason": "the check ended while it ran"}
    save_record(result, args)
    if replaces:  # at once, so that the record is of what lies there
        shutil.rmtree(beside(folder), ignore_errors=True)
        folder.rename(beside(folder))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    save(result, args)
    record |= run_stage(stage, args.seconds or stage.seconds, folder, args)
    passed = record["state"] == "passed"
    if passed:
        record.pop("before", None)
    stages[stage.name] = record
    print(f"==> {stage.name}: {record['state']} {record['reason']}", flush=True)
    save(result, args)
    if passed:
        shutil.rmtree(beside(folder), ignore_errors=True)
    return record["state"] in ("failed", "cut")


def beside(folder: Path) -> Path:
    """Where the best of a stage's earlier runs is kept."""
    return folder.with_name(f"{folder.name}.before")


def best(before: Record, folder: Path) -> tuple[Record | None, bool]:
    """The record of the best earlier run, and whether it is that of `folder` itself."""
    known, other = before.get("before"), beside(folder)
    if figures(folder) and (
        not figures(other) or weight(before, folder) >= weight(known or {}, other)
    ):
        names = ("state", "commit", "date", "device", "seconds")
        nobody_knows = {"state": "found", "commit": "unknown"}
        return nobody_knows | {name: before[name] for name in names if name in before}, True
    return known, False


@contextlib.contextmanager
def only_one(out: Path) -> Iterator[None]:
    """Within the context no other check writes to `out`; ends this one where one does."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / "lock").open("w")
    except OSError as error:
        raise SystemExit(f"--out {out} cannot be written: {error.strerror}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"--out {out}: another check is writing there") from None
        yield


def main(words: Sequence[str] | None = None) -> int:
    """Exit status 1 where a stage failed or was cut; not where it was left out or ended in part."""
    args = parse(words)
    # So that the stage is ended, too; a shell's background jobs begin with SIGINT ignored.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with only_one(args.out), tempfile.TemporaryDirectory() as folder:
        if args.wheels is not None:
            install(args.wheels, Path(folder), args.environment)
            sys.path.append(folder)
        result = {"about": about(args), "stages": earlier(args.out)}
        if is_vague(args.commit):
            print(f"commit {args.commit}: no stage counts as passed before; --commit names it")
        bad = [check(stage, args, result) for stage in chosen(args, result)]
        save(result, args)
    print(f"\n{summary(result, args.out)}\n\nMore in {args.out / 'check.md'}")
    return 1 if any(bad) else 0


if __name__ == "__main__":
    sys.exit(main())
