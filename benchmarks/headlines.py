"""The claims this kind of engine lives by, each measured as a ratio in one run.

    python -m benchmarks.headlines                 # the bundled model; a few minutes on two cores
    python -m benchmarks.headlines --only prefix radix --rounds 5

Both sides of a ratio run in turns on the same machine, and the ratio is the median over the rounds.
Sides whose engines are configured differently have a process each; where they differ only in the
work, they share one engine. Before it is timed, a side shows that it computed what was asked. The
last line is JSON.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from minisgl.build import build_engine
from minisgl.config import EngineConfig
from minisgl.core.request import Request, SamplingParams
from minisgl.engine.engine import Engine

Config = dict[str, Any]
Measure = Callable[["Bench", random.Random], dict[str, float]]  # figures by name


# ---- one side: an engine and what is measured on it ---------------------------------------------


class Bench:
    """An engine in this process, driven step by step with a clock."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.scale = 1.0  # of the amount of work
        self.times: dict[str, list[float]] = {}  # request -> when each of its tokens came
        self.tokens: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}  # prompt tokens found in the radix cache
        self._ended: set[str] = set()
        self._count = 0

    def prompt(self, generator: random.Random, length: int) -> list[int]:
        vocab = self.engine.info.limits.vocab_size
        return [generator.randrange(vocab // 8, vocab) for _ in range(length)]

    def submit(self, prompt: list[int], max_tokens: int) -> str:
        """Queue a request for exactly `max_tokens` greedy tokens."""
        self._count += 1
        name = f"r{self._count}"
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0.0, seed=0)
        self.times[name], self.tokens[name] = [], []
        self.engine.add(Request(name, prompt, params))
        return name

    def step(self) -> None:
        """One step of the engine."""
        for delta in self.engine.step():
            if delta.error is not None:
                raise SystemExit(f"the engine failed: {delta.error}")
            self.times[delta.request_id] += [time.perf_counter()] * len(delta.token_ids)
            self.tokens[delta.request_id] += delta.token_ids
            self.cached[delta.request_id] = delta.num_cached_tokens
            if delta.finish_reason is not None:
                self._ended.add(delta.request_id)

    def finish(self, names: Iterable[str]) -> None:
        while not self._ended.issuperset(names):
            self.step()

    def has_ended(self, name: str) -> bool:
        return name in self._ended

    def run(self, work: Sequence[tuple[list[int], int]]) -> float:
        """Seconds to serve `work` (prompts and output lengths), all submitted at once."""
        start = time.perf_counter()
        names = [self.submit(prompt, length) for prompt, length in work]
        self.finish(names)
        seconds = time.perf_counter() - start
        for name, (_, length) in zip(names, work, strict=True):
            if len(self.tokens[name]) != length:
                raise SystemExit(f"{name} has {len(self.tokens[name])} tokens, not {length}")
        return seconds


WARM_UP = 0.1  # of the work goes unmeasured first
CHANCE = 4  # tokens that two random prompts may begin with alike
BATCH = 16  # sequences at once where batching is compared


def part(count: int, bench: Bench) -> int:
    """`count` at the bench's scale, which is a tenth of the user's for a warm-up; never nothing."""
    return max(1, round(count * bench.scale))


def long_tailed(bench: Bench, generator: random.Random) -> list[tuple[list[int], int]]:
    """96 requests whose output lengths are as uneven as people's: log-normal, 4 to 512 tokens."""
    drawn = [generator.lognormvariate(3.9, 1.0) for _ in range(part(96, bench))]
    lengths = [min(512, max(4, round(length * bench.scale))) for length in drawn]
    return [(bench.prompt(generator, generator.randint(8, 64)), length) for length in lengths]


def continuous(bench: Bench, generator: random.Random) -> dict[str, float]:
    work = long_tailed(bench, generator)
    return {"tokens_per_second": sum(length for _, length in work) / bench.run(work)}


def static(pad: bool) -> Measure:
    def measure(bench: Bench, generator: random.Random) -> dict[str, float]:
        """The same engine, but nothing joins a batch that runs: it has to end first.

        With `pad`, every row of a batch is computed until its longest has ended, as libraries do
        that hold a batch in one tensor; what is computed beyond a request's length counts nothing.
        """
        work = long_tailed(bench, generator)
        seconds = 0.0
        for start in range(0, len(work), BATCH):
            batch = work[start : start + BATCH]
            longest = max(length for _, length in batch)
            seconds += bench.run([(ids, longest if pad else n) for ids, n in batch])
        return {"tokens_per_second": sum(length for _, length in work) / seconds}

    return measure


def ttft(length: int, hit: bool) -> Measure:
    def measure(bench: Bench, generator: random.Random) -> dict[str, float]:
        """Milliseconds to the first token of a prompt that is new, or was just served."""
        generator = random.Random(f"{generator.random()} {hit}")  # both sides share a cache
        found = []
        for _ in range(3):
            prompt = bench.prompt(generator, length)
            if hit:
                bench.run([(prompt, 1)])
            found.append(bench.run([(prompt, 1)]))
            cached = list(bench.cached.values())[-1]
            if not (cached == length - 1 if hit else cached <= CHANCE):
                raise SystemExit(f"{cached} of {length} tokens were cached, with hit={hit}")
        return {"ttft_ms": statistics.median(found) * 1e3}

    return measure


def worst_gap(bench: Bench, generator: random.Random) -> dict[str, float]:
    """Four streams run; three prompts as long as the context arrive, one after the other."""
    room = bench.engine.info.limits.max_context
    room = max(round(room * bench.scale), 256)
    streams = [bench.submit(bench.prompt(generator, 16), room - 32) for _ in range(4)]
    while min(len(bench.times[name]) for name in streams) < 20:
        bench.step()
    for _ in range(3):
        name = bench.submit(bench.prompt(generator, room - 8), 4)
        bench.finish([name])
    if any(bench.has_ended(name) for name in streams):
        raise SystemExit("the streams ended before the long prompts did")
    for name in streams:
        bench.engine.abort(name)
    gaps = [
        after - before
        for name in streams
        for before, after in zip(bench.times[name][10:], bench.times[name][11:], strict=False)
    ]
    return {"worst_gap_ms": max(gaps) * 1e3}


def steady(bench: Bench, generator: random.Random) -> dict[str, float]:
    """Plain decoding of a full batch."""
    work = [(bench.prompt(generator, 32), part(128, bench)) for _ in range(2 * BATCH)]
    return {"tokens_per_second": sum(length for _, length in work) / bench.run(work)}


def conversations(bench: Bench, generator: random.Random) -> dict[str, float]:
    """Eight conversations of five turns behind one system prompt, all at once."""
    system = bench.prompt(generator, 256)
    histories = [list(system) for _ in range(8)]
    seconds = 0.0
    for _ in range(5):
        for history in histories:
            history += bench.prompt(generator, part(128, bench))
        start = time.perf_counter()
        names = [bench.submit(list(history), part(48, bench)) for history in histories]
        bench.finish(names)
        seconds += time.perf_counter() - start
        for name, history in zip(names, histories, strict=True):
            history += bench.tokens[name]
    return {"seconds": seconds}


LENGTHS = (128, 512, 1024, 1984)
MEASURES: dict[str, Measure] = {
    "continuous": continuous,
    "static": static(pad=False),
    "static_padded": static(pad=True),
    "worst_gap": worst_gap,
    "steady": steady,
    "conversations": conversations,
    **{f"miss_{length}": ttft(length, hit=False) for length in LENGTHS},
    **{f"hit_{length}": ttft(length, hit=True) for length in LENGTHS},
}


def child(config: Config) -> None:
    """A side: builds its engine, then measures what it is told to, one JSON line each."""
    bench = Bench(build_engine(EngineConfig(**config)))
    print(json.dumps({"device": bench.engine.info.device, "model": bench.engine.info.model}))
    for line in sys.stdin:
        order = json.loads(line)
        bench.scale, generator = order["scale"], random.Random(order["seed"])
        sys.stdout.write(json.dumps(MEASURES[order["measure"]](bench, generator)) + "\n")
        sys.stdout.flush()
    bench.engine.close()


# ---- both sides in turns ------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    label: str
    measure: str
    config: Config = field(default_factory=dict)


@dataclass(frozen=True)
class Headline:
    """A claim: how many times better `ours` is than `other`."""

    name: str
    what: str
    ours: Side
    other: Side
    higher_is_better: bool = False


def headlines() -> list[Headline]:
    cold = {"disable_radix_cache": True}
    batch = {**cold, "max_running_requests": BATCH}
    whole = {**cold, "chunked_prefill_size": 8192, "batch_policy": "prefill-first"}
    return [
        Headline(
            "batching",
            "throughput: continuous or static batching, rows padded",
            Side("continuous", "continuous", batch),
            Side("static", "static_padded", batch),
            higher_is_better=True,
        ),
        Headline(
            "batching",
            "the same, but ended rows leave a static batch",
            Side("continuous", "continuous", batch),
            Side("static", "static", batch),
            higher_is_better=True,
        ),
        *(
            Headline(
                "prefix",
                f"first token of {length} tokens, in the cache or not",
                Side("hit", f"hit_{length}"),
                Side("miss", f"miss_{length}"),
            )
            for length in LENGTHS
        ),
        Headline(
            "chunked",
            "worst token gap while long prompts arrive",
            Side("chunks of 128", "worst_gap", {**cold, "chunked_prefill_size": 128}),
            Side("whole prompts", "worst_gap", whole),
        ),
        Headline(
            "overlap",
            "throughput: planning while the device works or not",
            Side("overlap", "steady", batch),
            Side("in turns", "steady", {**batch, "disable_overlap_schedule": True}),
            higher_is_better=True,
        ),
        Headline(
            "radix",
            "seconds for 8 conversations of 5 turns",
            Side("radix cache", "conversations"),
            Side("none", "conversations", cold),
        ),
    ]


class Worker:
    """A child process that holds one side's engine."""

    def __init__(self, config: Config) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.headlines", "--child", json.dumps(config)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self._answer()

    def measure(self, name: str, seed: int, scale: float) -> dict[str, float]:
        assert self._process.stdin is not None
        order = {"measure": name, "seed": seed, "scale": scale}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a side ended with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def compare(headline: Headline, base: Config, rounds: int, scale: float) -> dict[str, Any]:
    """The headline's row: both figures, the ratio, its spread. A small round warms both up."""
    sides = (headline.ours, headline.other)
    workers: dict[str, Worker] = {}
    figures: list[list[float]] = [[], []]
    unit = ""
    try:
        for number in range(rounds + 1):
            for side, found in zip(sides, figures, strict=True):
                key = json.dumps(side.config, sort_keys=True)
                if key not in workers:
                    workers[key] = Worker({**base, **side.config})
                size = scale if number else WARM_UP * scale
                measured = workers[key].measure(side.measure, number, size)
                if number:
                    ((unit, value),) = measured.items()
                    found.append(value)
    finally:
        for worker in workers.values():
            worker.close()
    ours, other = figures
    pairs = zip(ours, other, strict=True)
    ratios = sorted(a / b if headline.higher_is_better else b / a for a, b in pairs)
    facts = next(iter(workers.values())).facts
    return {
        "name": headline.name,
        "what": headline.what,
        "unit": unit,
        headline.ours.label: round(statistics.median(ours), 3),
        headline.other.label: round(statistics.median(other), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(ratios[0], 3),
        "ratio_max": round(ratios[-1], 3),
        "device": facts["device"],
        "model": facts["model"],
    }


def show(rows: list[dict[str, Any]], lines: list[Headline]) -> None:
    width = max(len(row["what"]) for row in rows)
    print(f"{'':<{width}}  {'ours':>22}  {'other':>22}  {'ratio':>7}  {'of rounds':>13}")
    for row, line in zip(rows, lines, strict=True):
        sides = [
            f"{side.label} {row[side.label]:,.{1 if row[side.label] < 100 else 0}f}"
            for side in (line.ours, line.other)
        ]
        spread = f"{row['ratio_min']:.2f}-{row['ratio_max']:.2f}"
        print(
            f"{row['what']:<{width}}  {sides[0]:>22}  {sides[1]:>22}  "
            f"{row['ratio']:>6.2f}x  {spread:>13}  {row['unit']}"
        )


def main() -> None:
    names = list(dict.fromkeys(headline.name for headline in headlines()))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="directory or hub id; the bundled model when absent")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of the work: 0.1 for a quick look"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        child(json.loads(args.child))
        return
    base = {"model": args.model, "device": args.device, "log_level": "warning"}
    chosen = [headline for headline in headlines() if headline.name in args.only]
    started, rows = time.perf_counter(), []
    for headline in chosen:
        rows.append(compare(headline, base, args.rounds, args.scale))
        print(f"{headline.what}: {rows[-1]['ratio']:.2f}x", file=sys.stderr)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(f"{rows[0]['model']} on {rows[0]['device']} ({machine}), median of {args.rounds} rounds")
    show(rows, chosen)
    result = {
        "benchmark": "headlines",
        "machine": machine,
        "rounds": args.rounds,
        "scale": args.scale,
        "seconds": round(time.perf_counter() - started, 1),
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
