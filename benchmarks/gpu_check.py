"""Stages of a check on a GPU machine, each bounded in time, resumable by name.

    benchmarks/gpu_check.sh --out results            # every stage that has not passed yet
    benchmarks/gpu_check.sh --out results kernels    # this one, again

A stage that fails, runs out of time or lacks something says so, and the next one runs. Results go
to --out as at most eight small files: check.json and check.md (every stage: state, seconds,
figures, end of output), and what the kernel benchmark writes. What a stage left there stays until
it has run to its end again, and of a stage that once passed the figures stay for good. --wheels
names a folder with wheels of packages this machine lacks.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kernels.report import goal_table

ROOT = Path(__file__).parents[1]
TAIL = 4000  # characters of a stage's output that are kept
ENGINE = ("msgspec", "tokenizers", "safetensors", "jinja2", "tqdm")

Record = dict[str, Any]


@dataclass(frozen=True)
class Stage:
    """A command, how long it may take, and the packages without which it is left out."""

    name: str
    words: tuple[str, ...]  # after the interpreter; {device} and {out} are filled in
    seconds: int
    needs: tuple[str, ...] = ()


def module(name: str, seconds: int, line: str, needs: tuple[str, ...] = ()) -> Stage:
    """The stage that runs a module with words that hold no spaces."""
    return Stage(name, ("-m", *line.split()), seconds, needs)


TESTS = "pytest -q -m gpu -p no:cacheprovider tests/gpu"
KERNELS = "benchmarks.kernels --device {device}"
MODEL = "--device {device} --shape qwen3-0.6b"
LARGE = "--device {device} --shape qwen3-8b --load-format dummy --warmup 3"
START = "--device {device} --shape qwen3-8b --rounds 1"
FEW = "--dtype float32 --batch 1 --temperature 0.0 --workload chat --rounds 2 --requests 2"
CARDS = ("pytest", "xdist", "triton")
# A line for each. Together they stay below ten minutes.
STAGES = (
    module("build", 40, "minisgl.csrc build", ("pybind11", "ninja")),
    Stage("tests", ("-m", *TESTS.split(), "-n", "8", "-k", "not hopper"), 105, CARDS),
    module("kernels", 114, f"{KERNELS} --out {{out}} --without hopper --seconds 82", ("triton",)),
    # No interpreter has run the Gluon kernel: should it hang, it takes nothing else with it.
    module("hopper-tests", 30, f"{TESTS} -k hopper", ("pytest", "triton")),
    module("hopper", 31, f"{KERNELS} --op attention --without portable tma", ("triton",)),
    module("all-reduce", 25, "benchmarks.all_reduce --device {device}", ENGINE),
    module("decode", 44, f"benchmarks.decode {MODEL} --batch 1 16 256", ENGINE),
    module("decode-8b", 44, f"benchmarks.decode {LARGE} --batch 1 16 64 --chunk 128", ENGINE),
    # Two starts: one that compiles every kernel, and one that finds them, which has a goal.
    module("startup-8b", 62, f"benchmarks.startup {START}", ENGINE),
    module("cascade", 30, f"benchmarks.cascade {MODEL} --batch 64 --shared 4096", ENGINE),
    module("speculative", 45, f"benchmarks.speculative {FEW}", ENGINE),
    module("offline", 29, "benchmarks.offline --num-requests 48", ENGINE),
)


def run_stage(stage: Stage, device: str, out: Path, environment: dict[str, str]) -> Record:
    """Runs one stage to its end or its limit; never raises for what the stage does.

    `out` is a folder for the files of this run alone.
    """
    missing = [name for name in stage.needs if not _importable(name, environment)]
    if missing:
        return {"state": "left out", "reason": f"not installed: {', '.join(missing)}"}
    words = [word.format(device=device, out=out) for word in stage.words]
    print(f"==> {stage.name}: {' '.join(words)}", flush=True)
    began, cut = time.monotonic(), False
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that what it starts ends with it
        )
        try:
            code = process.wait(timeout=stage.seconds)
            state, reason = ("passed", "") if code == 0 else ("failed", f"exit status {code}")
        except subprocess.TimeoutExpired:
            state, reason = "failed", f"not done after {stage.seconds} s"
            cut = True
        _end(process)
        log.seek(0)
        output = log.read()
    record = {
        "state": state,
        "reason": reason,
        "seconds": round(time.monotonic() - began, 1),
        "figures": _last_json(output),
        "output": output[-TAIL:],
    }
    if cut:
        record["cut"] = True
    if (out / "kernels.json").exists():
        record["figures"] = {"in": "kernels.json"}
    return record


def keep(record: Record, before: Record | None, fresh: Path, out: Path) -> Record:
    """Moves what a stage wrote to `fresh` into `out`, and returns what is recorded of it.

    A run that was cut short replaces no files, unless there are none; and what a stage found when
    it last passed stays beside what it finds now.
    """
    for path in sorted(fresh.iterdir()):
        if "cut" not in record or not (out / path.name).exists():
            path.replace(out / path.name)
    if before is not None and record["state"] != "passed":
        passed = before if before["state"] == "passed" else before.get("passed_before")
        if passed is not None:
            kept = ("commit", "date", "device", "seconds", "figures")
            record["passed_before"] = {name: passed[name] for name in kept if name in passed}
    return record


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends the stage and everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _importable(name: str, environment: dict[str, str]) -> bool:
    for folder in environment.get("PYTHONPATH", "").split(os.pathsep):
        if folder and (Path(folder) / name).is_dir():
            return True
    return importlib.util.find_spec(name) is not None


def _last_json(output: str) -> Any:
    """The JSON object in the last line, or the list there as its `rows`; None for anything else."""
    lines = output.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines and lines[-1][0] in "{[" else None
    except ValueError:
        return None
    return {"rows": found} if isinstance(found, list) else found


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


def describe(device: str) -> Record:
    """The machine, the commit and the day."""
    import torch

    from benchmarks.kernels.__main__ import describe as facts

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda, but torch finds no CUDA device")
    return facts(torch.device(device))


def markdown(result: Record) -> str:
    about = result["about"]
    lines = [
        f"# Check on {about['device']}",
        f"Commit {about['commit']}, {about['date']}, torch {about['torch']}.",
        "| stage | state | seconds | commit | |\n|---|---|---:|---|---|",
    ]
    for name, record in result["stages"].items():
        lines[-1] += (
            f"\n| {name} | {record['state']} | {record.get('seconds', '')} "
            f"| {record['commit']} | {record.get('reason', '')} |"
        )
    for name, record in result["stages"].items():
        figures = record.get("figures") or record.get("passed_before", {}).get("figures")
        if figures:
            plain = {k: v for k, v in figures.items() if isinstance(v, int | float | str)}
            lines.append(f"## {name}\n\n" + "\n".join(f"- {k}: {v}" for k, v in plain.items()))
        if figures and figures.get("goals"):
            lines.append(goal_table(figures["goals"]))
        if record["state"] == "failed":
            lines.append(f"## {name}: end of its output\n\n```\n{record['output'].strip()}\n```")
    return "\n\n".join(lines) + "\n"


def save(result: Record, out: Path) -> None:
    """Replaces both files at once, so that a run cut short leaves whole ones."""
    contents = {"check.json": json.dumps(result, indent=1) + "\n", "check.md": markdown(result)}
    for name, content in contents.items():
        fresh = out / f".{name}"
        fresh.write_text(content)
        fresh.replace(out / name)


def earlier(out: Path) -> dict[str, Record]:
    """What earlier runs left in `out`."""
    path = out / "check.json"
    return json.loads(path.read_text())["stages"] if path.exists() else {}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "gpu_check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(names)}")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/latest")
    parser.add_argument("--wheels", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(words)
    for name in args.stages:
        if name not in names:
            parser.error(f"stage must be one of {names}, got {name!r}")
    args.out = args.out.resolve()
    return args


def main(words: Sequence[str] | None = None) -> int:
    args = parse(words)
    args.out.mkdir(parents=True, exist_ok=True)
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        if args.wheels is not None:
            install(args.wheels, Path(folder), environment)
            sys.path.append(folder)
        about = describe(args.device)
        stages = earlier(args.out)
        result = {"about": about, "stages": stages}
        for stage in STAGES:
            before = stages.get(stage.name, {})
            done = before.get("state") == "passed" and before.get("commit") == about["commit"]
            if stage.name not in args.stages if args.stages else done:
                continue
            with tempfile.TemporaryDirectory(prefix=".", dir=args.out) as fresh:
                record = run_stage(stage, args.device, Path(fresh), environment)
                record |= {name: about[name] for name in ("commit", "date", "device")}
                stages[stage.name] = keep(record, before or None, Path(fresh), args.out)
            print(f"==> {stage.name}: {record['state']} {record.get('reason', '')}", flush=True)
            save(result, args.out)
    print(markdown(result))
    ran = [stages[name]["state"] for name in args.stages or stages]
    return 1 if "failed" in ran else 0


if __name__ == "__main__":
    sys.exit(main())
