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
from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.workload import QWEN3_06B, QWEN3_8B, Shape
from benchmarks.results import Results, add_options
from minisgl.build import BUNDLED_MODEL
from minisgl.config import EngineConfig
from minisgl.core.batch import Batch, StepOutput
from minisgl.core.executor import GrammarMasks
from minisgl.core.request import Request, SamplingParams
from minisgl.core.scheduler import Scheduler
from minisgl.device import Device, pick_device
from minisgl.engine.engine import Engine
from minisgl.engine.messages import EngineInfo
from minisgl.layers.weights import Placement
from minisgl.models.decoder import Decoder
from minisgl.models.hub import model_directory
from minisgl.parallel import Solo
from minisgl.start.facts import read_facts
from minisgl.start.load import load_worker
from minisgl.step.executor import LocalExecutor, plan_on_one_thread
from minisgl.step.kv_pool import KVShape

TINY = Shape("tiny", 4, 2, 16, 32, 48, 131)
SHAPES = {"tiny": (TINY, 2), "qwen3-0.6b": (QWEN3_06B, 28), "qwen3-8b": (QWEN3_8B, 36)}
TIED = ("qwen3-0.6b",)
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
class Noted:
    """A collected step."""

    batch: Batch
    launch_seconds: float  # of the host, in `dispatch` and `sample`
    output: StepOutput
    collected: float  # the host's clock

    @property
    def prefills(self) -> bool:
        return self.batch.num_decode < len(self.batch.chunks)


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


class Recorder:
    """An executor that notes what its steps took."""

    def __init__(self, executor: LocalExecutor) -> None:
        self._executor = executor
        self._launched: deque[tuple[Batch, float]] = deque()
        self.steps: list[Noted] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    def dispatch(self, batch: Batch) -> None:
        began = time.perf_counter()
        self._executor.dispatch(batch)
        self._launched.append((batch, time.perf_counter() - began))

    def sample(self, step: int, masks: GrammarMasks | None = None) -> None:
        began = time.perf_counter()
        self._executor.sample(step, masks)
        batch, seconds = self._launched.pop()
        self._launched.append((batch, seconds + time.perf_counter() - began))

    def collect(self) -> StepOutput:
        output = self._executor.collect()
        self.steps.append(Noted(*self._launched.popleft(), output, time.perf_counter()))
        return output


class Bench:
    """A loaded model, and engines that serve it in one way after another."""

    def __init__(self, args: argparse.Namespace, folder: Path, device: Device) -> None:
        self.args = args
        most, chunk = max(args.batch), max(args.chunk, default=0)
        self.max_tokens = args.warmup + args.steps + SLACK + CHUNKS
        tokens = most * (args.input_len + self.max_tokens + PAGE) + CHUNKS * chunk + 2 * PAGE
        config = EngineConfig(
            model=str(folder),
            dtype=args.dtype,
            load_format=args.load_format,
            max_running_requests=most + 1,
            max_total_tokens=tokens,
            page_size=PAGE,
            batch_invariant=args.batch_invariant,
            piecewise_cuda_graph_max_tokens=args.batch[0] + chunk if chunk else None,
        )
        facts = read_facts(config, folder, device)
        self.worker, self.facts = load_worker(facts, device), facts.model
        self.executor = LocalExecutor(self.worker)
        self._geometry = self.worker.geometry
        dtype = self.worker.dtype
        self.exact = dtype == torch.float32 or args.batch_invariant
        kv = KVShape(self.facts.num_layers, self.facts.num_kv_heads, self.facts.head_dim, dtype)
        self.kv_bytes = kv.bytes_per_token
        # A step looks up a few rows of an embedding that is not the head, too.
        unread = () if self.facts.tied_embeddings else ("model.embed_tokens.weight",)
        nowhere = Placement(torch.float32, torch.device("meta"), Solo())
        self.weight_bytes = sum(
            math.prod(weight.shape) * dtype.itemsize
            for weight in Decoder(self.facts, nowhere).weights()
            if weight.name not in unread
        )

    def engine(self, way: Way, chunk: int = 2048, profile_dir: str | None = None) -> Engine:
        """A new engine over the same worker. Its executor is a `Recorder`."""
        sizes = self._geometry.decode_sizes if way.graphs else {}
        pieces = self._geometry.piece_sizes if way.pieces else ()
        self.worker.geometry = replace(self._geometry, decode_sizes=sizes, piece_sizes=pieces)
        limits = self.executor.limits
        scheduler = Scheduler(
            limits, EngineConfig(chunked_prefill_size=chunk, disable_radix_cache=True)
        )
        info = EngineInfo("decode benchmark", "", "", "", "", [], limits)
        recorder = Recorder(self.executor)
        return Engine(scheduler, recorder, info, overlap=way.overlap, profile_dir=profile_dir)

    def requests(self, batch: int, max_tokens: int) -> list[Request]:
        generator = random.Random(self.args.seed)
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        return [
            Request(f"{i}", self.prompt(generator, self.args.input_len), params)
            for i in range(batch)
        ]

    def prompt(self, generator: random.Random, length: int) -> list[int]:
        return [generator.randrange(self.facts.vocab_size) for _ in range(length)]

    def tokens(self, way: Way, batch: int) -> dict[str, list[int]]:
        """What requests get in this way. Also the warm-up."""
        engine = self.engine(way)
        found: dict[str, list[int]] = {}
        for request in self.requests(batch, self.args.check):
            engine.add(request)
        while engine.has_work():
            for delta in engine.step():
                found.setdefault(delta.request_id, []).extend(delta.token_ids)
        if engine.failure is not None:
            raise RuntimeError(engine.failure)
        return found

    def steady(self, engine: Engine, batch: int) -> None:
        """Let `batch` requests reach the point where all of them decode."""
        for request in self.requests(batch, self.max_tokens):
            engine.add(request)
        waiting = dict.fromkeys(map(str, range(batch)), self.args.warmup)
        while any(left > 0 for left in waiting.values()):
            for delta in engine.step():
                waiting[delta.request_id] -= len(delta.token_ids)
            if engine.failure is not None:
                raise RuntimeError(engine.failure)

    def drain(self, engine: Engine) -> None:
        engine.abort_all()
        while engine.has_work():
            engine.step()

    def decode(self, way: Way, batch: int, figures: Figures) -> None:
        """One run of decode steps, added to `figures`."""
        self.executor.start_profile(traces=False)  # for the times of the device's spans
        engine = self.engine(way)
        recorder = _recorder(engine)
        self.steady(engine, batch)
        recorder.steps.clear()
        began = time.perf_counter()
        for _ in range(self.args.steps):
            engine.step()
        seconds = time.perf_counter() - began
        steps = recorder.steps[:]
        self.drain(engine)
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
            engine = self.engine(way, profile_dir=folder)
            self.steady(engine, batch)
            engine.start_profile(traces=True)
            for _ in range(min(self.args.steps, TRACED)):
                engine.step()
            _, trace = engine.stop_profile()
            self.drain(engine)
            with gzip.open(trace, "rt") as file:
                events = json.load(file)["traceEvents"]
        kinds = ("kernel", "gpu_memcpy", "gpu_memset")
        spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in kinds]
        return idle_share(spans) if spans else None

    def mixed(self, way: Way, batch: int, chunk: int, figures: Figures) -> dict[str, list[int]]:
        """Steps that decode `batch` sequences and prefill `chunk` tokens of one more, added to
        `figures`. What they drew."""
        engine = self.engine(way, chunk)
        recorder = _recorder(engine)
        self.steady(engine, batch)
        recorder.steps.clear()
        prompt = self.prompt(random.Random(self.args.seed), CHUNKS * chunk)
        engine.add(Request("long", prompt, SamplingParams(temperature=0.0, max_tokens=1)))
        steps: list[Noted] = []
        while len(steps) < CHUNKS:
            engine.step()
            steps = [noted for noted in recorder.steps if noted.prefills]
        self.drain(engine)
        times = [after.collected - before.collected for before, after in pairwise(steps)]
        figures.seconds.append(statistics.median(times))
        # The first one may meet a launch for the first time.
        figures.device_seconds.append(statistics.median(n.output.seconds for n in steps[1:]))
        figures.launch_seconds.append(statistics.median(n.launch_seconds for n in steps[1:]))
        return {"drawn": [token for n in steps for ids in n.output.token_ids for token in ids]}


def _recorder(engine: Engine) -> Recorder:
    recorder = engine._executor
    assert isinstance(recorder, Recorder)
    return recorder


def idle_share(spans: list[tuple[float, float]]) -> float:
    """The share of the time from the first span's begin to the last one's end that none covers."""
    spans = sorted(spans)
    covered, reach = 0.0, spans[0][0]
    for begin, end in spans:
        covered += max(0.0, end - max(begin, reach))
        reach = max(reach, end)
    return 1 - covered / (reach - spans[0][0])


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


def write_config(shape: str, folder: Path) -> None:
    """A config.json of the shape, for random weights."""
    facts, layers = SHAPES[shape]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": facts.vocab,
        "hidden_size": facts.hidden,
        "intermediate_size": facts.inner,
        "num_hidden_layers": layers,
        "num_attention_heads": facts.q_heads,
        "num_key_value_heads": facts.kv_heads,
        "head_dim": facts.head_dim,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": shape in TIED,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def compare(outputs: dict[str, dict[str, list[int]]], exact: bool) -> float:
    """The share of tokens equal to the first way's, the least of all ways.

    RuntimeError where all must be equal and are not, or there are fewer of them.
    """
    name, *others = outputs
    want = outputs[name]
    least = 1.0
    for other in others:
        pairs = [
            (a, b) for key in want for a, b in zip(want[key], outputs[other][key], strict=True)
        ]
        share = sum(a == b for a, b in pairs) / len(pairs)
        if exact and share < 1:
            raise RuntimeError(f"tokens differ between {name!r} and {other!r}: {share:.1%} equal")
        least = min(least, share)
    return least


def measure(bench: Bench, device: Device, rate: float, batch: int) -> list[dict[str, Any]]:
    """A row for each way, after their tokens were compared."""
    args = bench.args
    equal = compare({way.name: bench.tokens(way, batch) for way in WAYS}, bench.exact)
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
    equal = compare(drawn, bench.exact)
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
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="directory or hub id; the bundled model when absent")
    source.add_argument("--shape", choices=SHAPES, help="a known shape, with random weights")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"])
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
    device = pick_device(args.device)
    if device.torch_device.type == "cpu":
        plan_on_one_thread()
    with ExitStack() as stack:
        stack.callback(device.close)
        folder = BUNDLED_MODEL
        if args.shape is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_config(args.shape, folder)
            args.load_format = "dummy"
        elif args.model is not None:
            folder = model_directory(args.model, weights=args.load_format != "dummy")
        rate = copy_rate(device, args.copy_mib * 2**20)
        bench = Bench(args, folder, device)
        name, dtype = args.shape or folder.name, str(bench.worker.dtype).removeprefix("torch.")
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
