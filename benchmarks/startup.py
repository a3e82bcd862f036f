"""Seconds from process start to the first token, by stage, and peak memory.

    python -m benchmarks.startup                 # the bundled model, five fresh processes
    python -m benchmarks.startup --model DIR --rounds 3
    python -m benchmarks.startup --shape qwen3-8b --device cuda --rounds 1

Each round is a new process; the medians are shown. The first round is shown apart: on a GPU it
compiles every kernel, which later ones find on disk, and it may find cold files. Below "load and
warm up" are the engine's own stages. The last line is JSON.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from typing import Any

from benchmarks import models
from benchmarks.results import Results, add_options

STAGES = ("interpreter", "import torch", "import minisgl", "load and warm up", "first token")
LOADING = "load and warm up"
TABLE = re.compile(r"start-up:\n((?:  .+\n)+)")
LINE = re.compile(r"  (.+?) +([\d.]+) s")

Round = dict[str, Any]


def child(args: argparse.Namespace) -> None:
    """One round, in the new process: print the seconds of each stage and the peak in MB."""
    marks = [args.born, time.time()]
    import torch

    marks.append(time.time())
    torch_mb = peak_mb()
    from minisgl import LLM, SamplingParams
    from minisgl.log import configure

    marks.append(time.time())
    configure("info")
    with LLM(args.model, load_format=args.load_format, device=args.device) as llm:
        marks.append(time.time())
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        llm.generate([1, 2, 3], params, use_tqdm=False)
        marks.append(time.time())
        device = llm.info.device
    seconds = [after - before for before, after in itertools.pairwise(marks)]
    about = {"peak_mb": peak_mb(), "torch_mb": torch_mb, "torch": torch.__version__}
    about["device"] = device
    print(json.dumps({"seconds": seconds} | about))


def peak_mb() -> float:
    """Of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def engine_stages(log: str) -> dict[str, float]:
    """Seconds by stage in the table that an engine logs, its total left out."""
    table = TABLE.search(log)
    lines = LINE.findall(table[1] if table is not None else "")
    return {name: float(seconds) for name, seconds in lines if name != "total"}


def run_once(words: list[str], kernels: str) -> Round:
    command = [sys.executable, "-m", "benchmarks.startup", *words, "--born", repr(time.time())]
    environment = os.environ | {"TRITON_CACHE_DIR": kernels}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stderr is not None
    log = []
    for line in process.stderr:  # as it comes: of a start that hangs it says where
        sys.stderr.write(line)
        log.append(line)
    said = process.stdout.read()  # a line, which no pipe is too short for
    if process.wait():
        raise SystemExit(f"a start ended with exit status {process.returncode}")
    result = json.loads(said.splitlines()[-1])
    print(f"a start took {sum(result['seconds']):.2f} s", flush=True)
    return result | {"engine": engine_stages("".join(log))}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_options(parser)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="processes timed after the first")
    parser.add_argument("--born", type=float, help=argparse.SUPPRESS)
    add_options(parser)
    return parser.parse_args()


def show(first: Round, rounds: list[Round]) -> dict[str, float]:
    """Prints the table; returns medians by stage, the engine's among them."""
    medians: dict[str, float] = {}

    def line(name: str, cold: float, later: list[float]) -> None:
        medians[name.strip()] = statistics.median(later)
        print(f"{name:<30}{cold:>10.2f}{medians[name.strip()]:>11.2f}")

    print(f"{'stage':<30}{'first, s':>10}{'median, s':>11}")
    for i, stage in enumerate(STAGES):
        line(stage, first["seconds"][i], [r["seconds"][i] for r in rounds])
        for own in first["engine"] if stage == LOADING else ():
            line(f"  {own}", first["engine"][own], [r["engine"][own] for r in rounds])
    return medians


def main() -> None:
    args = parse()
    if args.born is not None:
        child(args)
        return
    results = Results("startup", args)
    load = os.getloadavg()[0]  # a busy machine's figures mean little
    results.put(model=models.name(args), load_before=round(load, 1))
    with ExitStack() as stack:
        kernels = stack.enter_context(tempfile.TemporaryDirectory())
        model, load_format = stack.enter_context(models.chosen(args))
        words = ["--load-format", load_format, "--device", args.device]
        if model is not None:
            words += ["--model", model]
        first = run_once(words, kernels)
        results.put(
            device=first["device"],
            torch=first["torch"],
            first_seconds=round(sum(first["seconds"]), 3),
            first_engine_stages=first["engine"],
        )
        rounds: list[Round] = []
        for turn in range(args.rounds):
            if turn and results.is_late(f"round {turn}"):
                break
            rounds.append(run_once(words, kernels))
    rounds = rounds or [first]
    medians = show(first, rounds)
    stages = {stage: round(medians[stage], 3) for stage in STAGES}
    total, peak = sum(stages.values()), max(r["peak_mb"] for r in rounds)
    of_torch = statistics.median(r["torch_mb"] for r in rounds)
    print(f"{'to the first token':<30}{sum(first['seconds']):>10.2f}{total:>11.2f}")
    print(
        f"{first['device']}, peak memory of the host {peak:.0f} MB, of which {of_torch:.0f} were "
        f"there once torch {first['torch']} was imported"
    )
    print(f"{len(rounds)} rounds; before, {load:.1f} tasks wanted the {os.cpu_count()} cores")
    results.finish(
        seconds=round(total, 3),
        stages=stages,
        engine_stages={name: round(medians[name], 3) for name in first["engine"]},
        peak_mb=round(peak, 1),
        torch_mb=round(of_torch, 1),
    )


if __name__ == "__main__":
    main()
