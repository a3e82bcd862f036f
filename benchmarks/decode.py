"""Decode steps end to end: their time, what share of it the device idles, against the roofline.

    python -m benchmarks.decode                                    # the bundled model
    python -m benchmarks.decode --shape qwen3-0.6b --batch 1 16 256 --device cuda
    python -m benchmarks.decode --shape qwen3-8b --load-format dummy --rounds 5

One model is loaded once and served by the real scheduler and loop in three ways: as it is, with
overlap off, and with graphs off. The ways take turns, and each round gives one ratio; medians are
reported. Before anything is timed each way serves the same requests: the tokens must be equal in
fp32 and with --batch-invariant, elsewhere the share of equal ones is shown.

Idle is the share of a run of decode steps in which the device's stream has nothing of a step to do,
by its own events; on CUDA `kernels` says the same of single kernels, by the torch profiler. The
roofline is the weights and the KV that a step must read, over the rate of a large copy measured in
this run. The last line is JSON; with --out, decode.json grows there as rows come.

Mixed rows are steps that decode the first batch size and prefill a chunk of one prompt more, run
eagerly and by piecewise graphs in turns. Where launching a step takes the host longer than the
device needs, the device waits: a ratio below 1 says that pieces end that, and by how much.
"""

import argparse
import gzip
import json
import math
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from benchmarks import models
from benchmarks.intervals import idle_share
from benchmarks.results import Results, add_options
from benchmarks.steps import (
    Noted,
    Recorder,
    Tokens,
    drain,
    equal_share,
    load,
    open_device,
    recorded,
    step,
)
from minisgl.config import EngineConfig, LoadFormat
from minisgl.core.request import Request, SamplingParams
from minisgl.device import Device
from minisgl.engine.engine import Engine
from minisgl.layers.weights import Placement
from minisgl.models.decoder import Decoder
from minisgl.parallel import Communicator
from minisgl.step.executor import LocalExecutor
from minisgl.step.kv_pool import KVShape

PAGE = 16
CHUNKS = 6  # of a mixed row's prompt
TRACED = 20  # steps in a profiler's trace, at most
HEAD = f"{'batch':>6} {'way':<12}{'step ms':>9}{'device':>9}{'launch':>9}{'ratio':>7}"
SLACK = 16  # tokens that requests have left when the steps have been timed


@dataclass(frozen=True)
class Way:
    """One way to run the same steps."""

    name: str
    overlap: bool = True
    graphs: bool = True
    pieces: bool = False


WAYS = (Way("as it is"), Way("overlap off", overlap=False), Way("graphs off", graphs=False))
MIXED = (Way("eager"), Way("piecewise", pieces=True))


@dataclass
class Figures:
    """Medians over the rounds of one batch size and way. Seconds are of one step."""

    batch: int
    way: str
    seconds: list[float] = field(default_factory=list)
    device_seconds: list[float] = field(default_factory=list)
    launch_seconds: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)

    def times(self) -> dict[str, Any]:
        return {
            "batch": self.batch,
            "way": self.way,
            "step_ms": 1e3 * statistics.median(self.seconds),
            "device_ms": 1e3 * statistics.median(self.device_seconds),
            "launch_ms": 1e3 * statistics.median(self.launch_seconds),
        }

    def ratio(self, first: "Figures") -> float:
        """Of this way's steps to another's, round by round."""
        return statistics.median(a / b for a, b in zip(self.seconds, first.seconds, strict=True))

    def row(self, copy_rate: float, kernels_idle: float | None) -> dict[str, Any]:
        step = statistics.median(self.seconds)
        return self.times() | {
            "tokens_per_s": self.batch / step,
            "idle": statistics.median(self.idle),
            "kernels_idle": kernels_idle,
            "roofline": statistics.median(self.bytes) / copy_rate / step,
        }


class Bench:
    """A loaded model, and engines that serve it in one way after another."""

    def __init__(
        self, args: argparse.Namespace, model: str | None, load_format: LoadFormat, device: Device
    ) -> None:
        self.args = args
        most, chunk = max(args.batch), max(args.chunk, default=0)
        self.max_tokens = args.warmup + args.steps + SLACK + CHUNKS
        tokens = most * (args.input_len + self.max_tokens + PAGE) + CHUNKS * chunk + 2 * PAGE
        config = EngineConfig(
            model=model,
            dtype=args.dtype,
            load_format=load_format,
            max_running_requests=most + 1,
            max_total_tokens=tokens,
            page_size=PAGE,
            batch_invariant=args.batch_invariant,
            piecewise_cuda_graph_max_tokens=args.batch[0] + chunk if chunk else None,
        )
        facts, self.worker = load(config, device)
        self.name, self.facts = args.shape or facts.path.name, facts.model
        self.executor = LocalExecutor(self.worker)
        self._geometry = self.worker.geometry
        dtype = self.worker.dtype
        self.exact = dtype == torch.float32 or args.batch_invariant
        kv = KVShape(self.facts.num_layers, self.facts.num_kv_heads, self.facts.head_dim, dtype)
        self.kv_bytes = kv.bytes_per_token
        # A step looks up a few rows of an embedding that is not the head, too.
        unread = () if self.facts.tied_embeddings else ("model.embed_tokens.weight",)
        nowhere = Placement(torch.float32, torch.device("meta"), Communicator())
        self.weight_bytes = sum(
            math.prod(weight.shape) * dtype.itemsize
            for weight in Decoder(self.facts, nowhere).weights()
            if weight.name not in unread
        )

    def engine(
        self, way: Way, chunk: int = 2048, profile_dir: str | None = None
    ) -> tuple[Engine, Recorder]:
        """A new engine over the same worker."""
        sizes = self._geometry.decode_sizes if way.graphs else {}
        pieces = self._geometry.piece_sizes if way.pieces else ()
        self.worker.geometry = replace(self._geometry, decode_sizes=sizes, piece_sizes=pieces)
        config = EngineConfig(chunked_prefill_size=chunk, disable_radix_cache=True)
        return recorded(self.executor, config, overlap=way.overlap, profile_dir=profile_dir)

    def requests(self, batch: int, max_tokens: int) -> list[Request]:
        generator = random.Random(self.args.seed)
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        return [
            Request(f"{i}", self.prompt(generator, self.args.input_len), params)
            for i in range(batch)
        ]

    def prompt(self, generator: random.Random, length: int) -> list[int]:
        return [generator.randrange(self.facts.vocab_size) for _ in range(length)]

    def tokens(self, way: Way, batch: int) -> Tokens:
        """What requests get in this way. Also the warm-up."""
        engine, _ = self.engine(way)
        found: Tokens = {}
        for request in self.requests(batch, self.args.check):
            engine.add(request)
        while engine.has_work():
            for delta in step(engine):
                found.setdefault(delta.request_id, []).extend(delta.token_ids)
        return found

    def steady(self, engine: Engine, batch: int) -> None:
        """Let `batch` requests reach the point where all of them decode."""
        for request in self.requests(batch, self.max_tokens):
            engine.add(request)
        waiting = dict.fromkeys(map(str, range(batch)), self.args.warmup)
        while any(left > 0 for left in waiting.values()):
            for delta in step(engine):
                waiting[delta.request_id] -= len(delta.token_ids)

    def decode(self, way: Way, batch: int, figures: Figures) -> None:
        """One run of decode steps, added to `figures`."""
        self.executor.start_profile(traces=False)  # for the times of the device's spans
        engine, recorder = self.engine(way)
        self.steady(engine, batch)
        recorder.steps.clear()
        began = time.perf_counter()
        for _ in range(self.args.steps):
            engine.step()
        seconds = time.perf_counter() - began
        steps = recorder.steps[:]
        drain(engine)
        self.executor.stop_profile("")
        if any(noted.batch.num_decode != batch or noted.prefills for noted in steps):
            raise RuntimeError(f"not every step decoded {batch} sequences and nothing else")
        figures.seconds.append(seconds / len(steps))
        figures.device_seconds.append(statistics.fmean(n.output.seconds for n in steps))
        figures.launch_seconds.append(statistics.fmean(n.launch_seconds for n in steps))
        figures.idle.append(idle_share([span for n in steps for span in n.output.spans]))
        tokens = sum(c.start + c.length for n in steps for c in n.batch.chunks) / len(steps)
        figures.bytes.append(self.weight_bytes + tokens * self.kv_bytes)

    def kernels_idle(self, way: Way, batch: int) -> float | None:
        """The share of a run of decode steps in which no kernel ran, by the torch profiler.

        None where its trace holds no kernels.
        """
        with tempfile.TemporaryDirectory() as folder:
            engine, _ = self.engine(way, profile_dir=folder)
            self.steady(engine, batch)
            engine.start_profile(traces=True)
            for _ in range(min(self.args.steps, TRACED)):
                engine.step()
            _, trace = engine.stop_profile()
            drain(engine)
            with gzip.open(trace, "rt") as file:
                events = json.load(file)["traceEvents"]
        kinds = ("kernel", "gpu_memcpy", "gpu_memset")
        spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in kinds]
        return idle_share(spans) if spans else None

    def mixed(self, way: Way, batch: int, chunk: int, figures: Figures) -> Tokens:
        """Steps that decode `batch` sequences and prefill `chunk` tokens of one more, added to
        `figures`. What they drew."""
        engine, recorder = self.engine(way, chunk)
        self.steady(engine, batch)
        recorder.steps.clear()
        prompt = self.prompt(random.Random(self.args.seed), CHUNKS * chunk)
        engine.add(Request("long", prompt, SamplingParams(temperature=0.0, max_tokens=1)))
        steps: list[Noted] = []
        while len(steps) < CHUNKS:
            engine.step()
            steps = [noted for noted in recorder.steps if noted.prefills]
        drain(engine)
        times = [after.collected - before.collected for before, after in pairwise(steps)]
        figures.seconds.append(statistics.median(times))
        # The first one may meet a launch for the first time.
        figures.device_seconds.append(statistics.median(n.output.seconds for n in steps[1:]))
        figures.launch_seconds.append(statistics.median(n.launch_seconds for n in steps[1:]))
        return {"drawn": [token for n in steps for ids in n.output.token_ids for token in ids]}


def copy_rate(device: Device, size: int, repeats: int = 10) -> float:
    """Bytes per second of a large copy, read and written ones together; the best of some."""

    def run() -> float:
        source = torch.ones(size // 4, dtype=torch.float32, device=device.torch_device)
        target = torch.empty_like(source)
        target.copy_(source)
        best = math.inf
        for _ in range(repeats):
            begin = device.record()
            target.copy_(source)
            end = device.record()
            end.wait()
            best = min(best, end.seconds_since(begin))
        return 2 * size / best

    return device.run(run)


def measure(bench: Bench, device: Device, rate: float, batch: int) -> list[dict[str, Any]]:
    """A row for each way, after their tokens were compared."""
    args = bench.args
    equal = equal_share({way.name: bench.tokens(way, batch) for way in WAYS}, bench.exact)
    figures = {way.name: Figures(batch, way.name) for way in WAYS}
    for turn in range(args.rounds):
        for way in WAYS[:: -1 if turn % 2 else 1]:
            bench.decode(way, batch, figures[way.name])
    rows = []
    for way in WAYS:
        on_gpu = device.torch_device.type == "cuda"
        own = figures[way.name]
        row = own.row(rate, bench.kernels_idle(way, batch) if on_gpu else None)
        rows.append(row | {"ratio": own.ratio(figures[WAYS[0].name]), "equal": equal})
    return rows


def measure_mixed(bench: Bench, batch: int, chunk: int) -> list[dict[str, Any]]:
    """A row for each way of mixed steps, after their tokens were compared."""
    warm_up, figures = ({way.name: Figures(batch, way.name) for way in MIXED} for _ in range(2))
    drawn = {way.name: bench.mixed(way, batch, chunk, warm_up[way.name]) for way in MIXED}
    equal = equal_share(drawn, bench.exact)
    for turn in range(bench.args.rounds):
        for way in MIXED[:: -1 if turn % 2 else 1]:
            bench.mixed(way, batch, chunk, figures[way.name])
    facts = {"chunk": chunk, "equal": equal}
    first, _ = figures.values()
    return [own.times() | {"ratio": own.ratio(first)} | facts for own in figures.values()]


def times(row: dict[str, Any]) -> str:
    return (
        f"{row['batch']:>6} {row['way']:<12}{row['step_ms']:>9.3f}{row['device_ms']:>9.3f}"
        f"{row['launch_ms']:>9.3f}{row['ratio']:>7.3f}"
    )


def show(row: dict[str, Any]) -> None:
    kernels = "" if row["kernels_idle"] is None else f"{row['kernels_idle']:.1%}"
    print(
        f"{times(row)}{row['tokens_per_s']:>10.0f}"
        f"{row['idle']:>8.1%}{kernels:>9}{row['roofline']:>10.1%}{row['equal']:>8.1%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_options(parser)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=5, help="tokens of each before it counts")
    parser.add_argument("--steps", type=int, default=50, help="of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", type=int, default=16, help="tokens of each that are compared")
    parser.add_argument("--chunk", type=int, nargs="*", default=[32, 128, 512], help="mixed steps")
    parser.add_argument("--copy-mib", type=int, default=256, help="size of the copy")
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser)
    args = parser.parse_args()
    results = Results("decode", args)
    results.put(load=os.getloadavg()[0], rounds=args.rounds)
    with open_device(args.device) as device, models.chosen(args) as (model, load_format):
        rate = copy_rate(device, args.copy_mib * 2**20)
        bench = Bench(args, model, load_format, device)
        name, dtype = bench.name, str(bench.worker.dtype).removeprefix("torch.")
        results.put(model=name, device=device.name, dtype=dtype, copy_bytes_per_s=rate)
        print(f"{name} {dtype} on {device.name}; copies run at {rate / 1e9:.1f} GB/s")
        print(f"{HEAD}{'tok/s':>10}{'idle':>8}{'kernels':>9}{'roofline':>10}{'equal':>8}")
        results.put(rows=[], mixed=[])
        for batch in args.batch:
            first = not results.content["rows"]
            if first or not results.is_late(f"batch {batch}"):
                for row in measure(bench, device, rate, batch):
                    show(row)
                    results.add("rows", row)
        if args.chunk:
            print(f"{HEAD}{'chunk':>8}{'equal':>8}")
        for chunk in args.chunk:
            if not results.is_late(f"chunk {chunk}"):
                for row in measure_mixed(bench, args.batch[0], chunk):
                    print(f"{times(row)}{row['chunk']:>8}{row['equal']:>8.1%}", flush=True)
                    results.add("mixed", row)
        results.finish(compilations_after_ready=bench.executor.compilations)


if __name__ == "__main__":
    main()
