"""Milliseconds a token on a CPU, alone and beside programs that keep its cores busy.

    python -m benchmarks.busy                # the bundled model, beside four busy loops
    python -m benchmarks.busy --loops 8 --rounds 5

As many threads as cores are a row, and one thread, which waits for nobody. Figures are medians of
processes that take turns. Columns are alone, beside the busy loops, and their ratio. Run it on an
idle machine: whatever else runs is in both columns. The last line is JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from benchmarks.results import Results, add_options

WAYS = {"as many threads as cores": {}, "one thread": {"OMP_NUM_THREADS": "1"}}
SETTINGS = ("OMP_NUM_THREADS",)
DECODE = """
import json, sys, time
from minisgl import LLM, SamplingParams
with LLM(device="cpu", max_total_tokens=2048, log_level="warning") as llm:
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    llm.generate("Hello", params, use_tqdm=False)
    began = time.perf_counter()
    llm.generate("Hello", params, use_tqdm=False)
    print(json.dumps((time.perf_counter() - began) / params.max_tokens * 1e3))
"""


def milliseconds_a_token(way: str) -> float:
    """Of one new process."""
    others = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    command = [sys.executable, "-c", DECODE]
    done = subprocess.run(
        command, env={**others, **WAYS[way]}, stdout=subprocess.PIPE, text=True, check=True
    )
    return float(json.loads(done.stdout))


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """That many processes which each want a core."""
    with ExitStack() as stack:
        for _ in range(loops):
            loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(loop.wait)
            stack.callback(loop.kill)
        yield


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loops", type=int, default=4, help="programs that keep a core busy")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each figure")
    add_options(parser)
    args = parser.parse_args()
    results = Results("busy", args)
    results.put(loops=args.loops, cores=os.cpu_count(), load_before=round(os.getloadavg()[0], 1))
    seen: dict[str, tuple[list[float], list[float]]] = {way: ([], []) for way in WAYS}
    for turn in range(args.rounds):
        if turn and results.is_late(f"round {turn}"):
            break
        for column, loops in enumerate((0, args.loops)):
            with busy(loops):
                for way, columns in seen.items():
                    columns[column].append(milliseconds_a_token(way))
    print(f"{'ms a token':<20}{'alone':>9}{f'beside {args.loops}':>11}{'ratio':>8}")
    for way, columns in seen.items():
        alone, beside = map(statistics.median, columns)
        print(f"{way:<20}{alone:>9.2f}{beside:>11.2f}{beside / alone:>8.1f}")
        row = {"way": way, "alone_ms": round(alone, 3), "beside_ms": round(beside, 3)}
        results.add("rows", {**row, "ratio": round(beside / alone, 2)})
    results.finish()


if __name__ == "__main__":
    main()
