"""Seconds from process start to the first token, by stage, and peak memory.

    python -m benchmarks.startup                 # the bundled model, five fresh processes
    python -m benchmarks.startup --model DIR --rounds 3

Each round is a new process; the medians are shown. The first round, which may find cold files and
caches, is shown apart. The last line is JSON.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time

STAGES = ("interpreter", "import torch", "import minisgl", "load and warm up", "first token")


def child(model: str | None, load_format: str, born: float) -> None:
    """One round, in the new process: print the seconds of each stage and the peak in MB."""
    marks = [born, time.time()]
    import torch

    marks.append(time.time())
    from minisgl import LLM, SamplingParams

    marks.append(time.time())
    with LLM(model, load_format=load_format, log_level="warning") as llm:
        marks.append(time.time())
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        llm.generate([1, 2, 3], params, use_tqdm=False)
        marks.append(time.time())
    import resource

    seconds = [after - before for before, after in itertools.pairwise(marks)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": seconds, "peak_mb": peak, "torch": torch.__version__}))


def run_once() -> dict:
    command = [sys.executable, "-m", "benchmarks.startup", *sys.argv[1:]]
    command += ["--born", repr(time.time())]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory or hub id; the bundled model when absent")
    parser.add_argument("--load-format", choices=["auto", "dummy"], default="auto")
    parser.add_argument("--rounds", type=int, default=5, help="processes timed after the first")
    parser.add_argument("--born", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.born is not None:
        child(args.model, args.load_format, args.born)
        return
    load = os.getloadavg()[0]  # a busy machine's figures mean little
    first = run_once()
    rounds = [run_once() for _ in range(args.rounds)] or [first]
    columns = zip(*(r["seconds"] for r in rounds), strict=True)
    median = [statistics.median(column) for column in columns]
    total, peak = sum(median), max(r["peak_mb"] for r in rounds)
    print(f"{'stage':<20}{'first, s':>10}{'median, s':>11}")
    for stage, cold, warm in zip(STAGES, first["seconds"], median, strict=True):
        print(f"{stage:<20}{cold:>10.2f}{warm:>11.2f}")
    print(f"{'to the first token':<20}{sum(first['seconds']):>10.2f}{total:>11.2f}")
    print(f"peak memory {peak:.0f} MB, torch {first['torch']}, {args.rounds} rounds")
    print(f"before it, {load:.1f} tasks wanted the {os.cpu_count()} cores")
    stages = dict(zip(STAGES, (round(s, 3) for s in median), strict=True))
    print(
        json.dumps(
            {
                "benchmark": "startup",
                "model": args.model or "bundled",
                "seconds": round(total, 3),
                "first_seconds": round(sum(first["seconds"]), 3),
                "stages": stages,
                "load_before": round(load, 1),
                "peak_mb": round(peak, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
