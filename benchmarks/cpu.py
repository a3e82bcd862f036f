"""One user, a prompt, many requests and a server's streams on a CPU, beside other engines.

    python -m benchmarks.cpu --shape qwen3-0.6b --against ../before
    python -m benchmarks.cpu --model M --engine transformers vllm=VLLM/bin/python \\
        openvino=OV/bin/python:M_openvino llamacpp=FOLDER:M.gguf other=http://127.0.0.1:8000
    python -m benchmarks.cpu --model M --quantization int8 int4 --engine \\
        llamacpp=FOLDER:M.gguf llamacpp-q8_0=FOLDER:M-q8.gguf llamacpp-q4_0=FOLDER:M-q4.gguf

The first compares with another checkout of minisgl as well, the second with engines that may have a
Python, and a form of the model, of their own; a server given by its URL takes token ids at
/v1/completions. llama.cpp is a folder's that node-llama-cpp was installed in (`cpu_llamacpp.mjs`).
An engine may come several times, as NAME-LABEL. The third measures minisgl with quantised weights
too: each such side beside our own without, and beside the engines whose label says as many bits.
Without --engine those are measured that this Python can import and that read the model as it is:
the folder, or OpenVINO's export in it.

First the limits of the machine: how fast its threads read memory and multiply matrices. Then
every engine is loaded, each in its own process, and they answer in turns, so that all meet the same
machine; those that wait are stopped (`cpu_processes.py`). Then the same with the servers of those
that serve, each with --streams clients in a closed loop (a client sends its next request when its
last one has ended), which share the machine's cores.

Prompts are random and never repeat. A figure is the median of the rounds, with the lowest and the
highest: a decode step is (time of N + 1 tokens less time of 1) / N after a prompt of 32. `others`
is the share of a core that other programs used meanwhile, servers given by a URL among them:
figures of a busy machine mean little. The last line is JSON.
"""

import argparse
import importlib.util
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from benchmarks import models
from benchmarks.cpu_processes import SERVERS, Engine, Offline, OwnServer, Served, Side, cpu_seconds
from benchmarks.http_load import Job, percentile
from benchmarks.results import ROOT, Results, add_options

LIMITS = """
import json, time, torch
def best(call, work):
    times = []
    while len(times) < 6 and sum(times) < 10:
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return work / min(times) / 1e9
def products(dtype):
    square = torch.randn(2048, 2048, dtype=dtype)
    return round(best(lambda: square @ square, 2 * 2048**3), 1)
numbers = torch.ones(1 << 28)
limits = {
    "threads": torch.get_num_threads(),
    "read_gb_per_s": round(best(numbers.sum, numbers.nbytes), 1),
    "fp32_gflop_per_s": products(torch.float32),
}
# Without AVX-512 PyTorch multiplies bf16 a hundred times slower than fp32.
if torch.backends.cpu.get_cpu_capability() == "AVX512":
    limits["bf16_gflop_per_s"] = products(torch.bfloat16)
print(json.dumps(limits))
"""


# Engine -> the module that is imported, and a file by which a folder says that it can be read.
IMPORTABLE = {
    "transformers": ("transformers", "*.safetensors"),
    "vllm": ("vllm", "*.safetensors"),
    "openvino": ("openvino_genai", "openvino_model.xml"),
}
ENGINES = (*IMPORTABLE, "llamacpp")

E = TypeVar("E", bound=Engine)


@dataclass(frozen=True)
class Row(Generic[E]):
    """What one question tells: the figures, with whether more of each is better."""

    titles: Sequence[tuple[str, bool]]
    measure: Callable[[E], Sequence[float]]


class Load:
    """Random prompts and what is asked of them."""

    def __init__(self, args: argparse.Namespace, vocab: int) -> None:
        self._args = args
        self._vocab = min(vocab, 10_000)
        self._random = random.Random(args.seed)
        self._lengths = random.Random(args.seed)  # the same in every round, for every engine
        self._requests = self._pairs(args.num_requests, args.input_len, args.output_len)
        count = args.streams * args.stream_requests
        self._streamed = self._pairs(count, args.stream_input_len, args.stream_output_len)

    def _pairs(self, count: int, inputs: list[int], outputs: list[int]) -> list[tuple[int, int]]:
        draw = self._lengths.randint
        return [(draw(*inputs), draw(*outputs)) for _ in range(count)]

    def _prompt(self, length: int) -> list[int]:
        return [self._random.randrange(16, self._vocab) for _ in range(length)]

    def offline(self) -> list[Row[Engine]]:
        args = self._args
        return [
            Row([("decode, ms a token", False)], self.decode),
            Row([(f"prompt of {args.prompt_tokens}, tok/s", True)], self.prefill),
            Row([(f"{args.num_requests} requests, output tok/s", True)], self.many),
        ]

    def served(self) -> list[Row[Served]]:
        titles = [
            (f"server, {self._args.streams} streams: output tok/s", True),
            ("time to first token p50, ms", False),
            ("time to first token p99, ms", False),
            ("gap between tokens p99, ms", False),
        ]
        return [Row(titles, self.streams)]

    def decode(self, engine: Engine) -> list[float]:
        """Milliseconds a token, for one user."""
        prompt, count = self._prompt(32), self._args.decode_tokens
        first = engine.seconds([prompt], [1])
        return [(engine.seconds([prompt], [1 + count]) - first) / count * 1e3]

    def prefill(self, engine: Engine) -> list[float]:
        """Prompt tokens a second."""
        length = self._args.prompt_tokens
        return [length / engine.seconds([self._prompt(length)], [1])]

    def many(self, engine: Engine) -> list[float]:
        """Output tokens a second of many requests at once."""
        prompts = [self._prompt(length) for length, _ in self._requests]
        outputs = [count for _, count in self._requests]
        return [sum(outputs) / engine.seconds(prompts, outputs)]

    def streams(self, server: Served) -> list[float]:
        """Output tokens a second; milliseconds to the first token and between tokens."""
        jobs = [Job(self._prompt(length), count) for length, count in self._streamed]
        outcomes, seconds = server.outcomes(jobs, self._args.streams)
        first = [outcome.ttft * 1e3 for outcome in outcomes]
        gaps = [gap * 1e3 for outcome in outcomes for gap in outcome.gaps]
        speed = sum(outcome.output_tokens for outcome in outcomes) / seconds
        return [speed, percentile(first, 0.5), percentile(first, 0.99), percentile(gaps, 0.99)]


class Table:
    """Measures rows in turns, and prints them."""

    def __init__(self, results: Results, rounds: int, rivals: Mapping[str, Sequence[str]]) -> None:
        """rivals: of each side of ours, by name, those that it is to be faster than."""
        self._results = results
        self._rounds = rounds
        self._rivals = rivals

    def head(self, engines: Sequence[Engine]) -> None:
        names = "".join(f"{engine.name:>26}" for engine in engines)
        print(f"{'':<38}{names}  others", flush=True)

    def add(self, row: Row[E], engines: Sequence[E]) -> None:
        if self._results.is_late(row.titles[0][0]):
            return
        for engine in engines:
            with engine.awake():
                row.measure(engine)  # warm
        began, (all_before, own_before) = time.perf_counter(), cpu_seconds()
        found: dict[str, list[Sequence[float]]] = {engine.name: [] for engine in engines}
        for _ in range(self._rounds):
            for engine in engines:
                with engine.awake():
                    found[engine.name].append(row.measure(engine))
        all_after, own_after = cpu_seconds()
        others = (all_after - all_before) - (own_after - own_before)
        share = max(others, 0.0) / (time.perf_counter() - began)
        for index, (title, more_is_better) in enumerate(row.titles):
            values = {name: [figures[index] for figures in each] for name, each in found.items()}
            self._show(title, more_is_better, values, share)

    def _show(
        self, title: str, more_is_better: bool, values: dict[str, list[float]], others: float
    ) -> None:
        medians = {name: statistics.median(each) for name, each in values.items()}
        spans = {name: (min(each), max(each)) for name, each in values.items()}
        faster = {
            ours: {
                other: round((medians[ours] / medians[other]) ** (1 if more_is_better else -1), 3)
                for other in rivals
                if other in medians  # it may not serve
            }
            for ours, rivals in self._rivals.items()
        }
        cells = [
            f"{short(medians[name])} ({short(low)}-{short(high)})"
            for name, (low, high) in spans.items()
        ]
        print(f"{title:<38}{''.join(f'{c:>26}' for c in cells)}  {others:>6.2f}", flush=True)
        for ours, ratios in faster.items():
            if shown := ", ".join(f"{ratio:.2f}x {other}'s" for other, ratio in ratios.items()):
                print(f"    speed of {ours}: {shown}", flush=True)
        row = {"row": title, "others": round(others, 2)}
        row |= {"range": {name: [round(each, 3) for each in span] for name, span in spans.items()}}
        row |= {"median": {name: round(value, 3) for name, value in medians.items()}}
        self._results.add("rows", {**row, "faster": faster})


def short(value: float) -> str:
    """With three digits at least."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def chosen_sides(args: argparse.Namespace, model: str) -> list[Side]:
    """minisgl first, then whatever is compared with it."""
    sides = [Side("minisgl", "minisgl", sys.executable, ROOT, model)]
    for kind in args.quantization:
        flags = {"quantization": kind}
        sides.append(replace(sides[0], name=f"minisgl-{kind}", bits=stated_bits(kind), flags=flags))
    if args.against is not None:
        before = Path(args.against).absolute()
        sides.append(Side(before.name, "minisgl", sys.executable, before, model))
    for text in importable(Path(model)) if args.engine is None else args.engine:
        name, _, rest = text.partition("=")
        url = rest if rest.startswith(("http://", "https://")) else None
        engine, _, label = (name, "", "") if url else name.partition("-")
        if url is None and engine not in ENGINES:
            raise SystemExit(f"--engine {text}: {engine} is none of {', '.join(ENGINES)}, or a URL")
        python, _, own_model = rest.partition(":")
        if engine == "llamacpp" and url is None and not own_model:
            raise SystemExit(f"--engine {text}: llamacpp takes FOLDER:MODEL.gguf")
        python = sys.executable if url or not python else python
        model_read, bits = own_model or model, stated_bits(label)
        sides.append(Side(name, engine, python, ROOT, model_read, url, bits))
    if len({side.name for side in sides}) < len(sides):
        raise SystemExit(f"sides need different names: {', '.join(side.name for side in sides)}")
    return sides


def stated_bits(label: str) -> int:
    """The first number of int8, q4_0 and the like; 16 where there is none."""
    number = re.search(r"\d+", label)
    return 16 if number is None else int(number.group())


def rivals(sides: Sequence[Side], ours: int) -> dict[str, list[str]]:
    """Of each of the first `ours` sides the others of as many bits; quantised ones begin with the
    first, which has those as well whose bits no side of ours has."""
    own, others = sides[:ours], sides[ours:]
    found = {side.name: [own[0].name] if side is not own[0] else [] for side in own}
    for other in others:
        like = next((side for side in own if side.bits == other.bits), own[0])
        found[like.name].append(other.name)
    return found


def importable(model: Path) -> list[str]:
    return [
        engine
        for engine, (module, file) in IMPORTABLE.items()
        if importlib.util.find_spec(module) is not None and any(model.glob(file))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_options(parser)
    parser.add_argument("--against", help="another checkout of minisgl, measured beside this one")
    parser.add_argument(
        "--engine",
        nargs="*",
        help=f"of {', '.join(ENGINES)}, each as NAME[-LABEL][=PYTHON[:MODEL]]; any server as "
        "NAME=URL",
    )
    parser.add_argument("--quantization", nargs="*", default=[], choices=["int8", "int4"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decode-tokens", type=int, default=64, help="of one user")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--num-requests", type=int, default=16)
    parser.add_argument("--input-len", type=int, nargs=2, default=[32, 256])
    parser.add_argument("--output-len", type=int, nargs=2, default=[32, 128])
    parser.add_argument("--streams", type=int, default=16, help="of a server; 0: no server")
    parser.add_argument("--stream-requests", type=int, default=4, help="of each stream")
    parser.add_argument("--stream-input-len", type=int, nargs=2, default=[64, 256])
    parser.add_argument("--stream-output-len", type=int, nargs=2, default=[64, 128])
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser)
    args = parser.parse_args()
    results = Results("cpu", args)
    limits = json.loads(subprocess.check_output([sys.executable, "-c", LIMITS], text=True))
    results.put(model=models.name(args), limits=limits, load_before=round(os.getloadavg()[0], 1))
    print(" ".join(f"{name} {value}" for name, value in limits.items()), flush=True)
    with ExitStack() as stack:
        model, _ = stack.enter_context(models.chosen(args))
        path = Path(model) if model is not None else ROOT / "minisgl/assets/tiny"
        vocab = json.loads((path / "config.json").read_text())["vocab_size"]
        sides, load = chosen_sides(args, str(path)), Load(args, vocab)
        table = Table(results, args.rounds, rivals(sides, 1 + len(args.quantization)))
        with ExitStack() as offline:
            engines: list[Engine] = []
            for side in sides:
                engines.append(Served(side.name, side.url) if side.url else Offline(side))
                offline.callback(engines[-1].close)
            results.put(releases={engine.name: engine.release for engine in engines})
            table.head(engines)
            for row in load.offline():
                table.add(row, engines)
        serving = [side for side in sides if side.url or side.engine in SERVERS]
        if args.streams == 0 or not (path / "tokenizer.json").exists():  # a shape has none
            serving = []
        servers: list[Served] = []
        for side in serving:
            servers.append(Served(side.name, side.url) if side.url else OwnServer(side))
            stack.callback(servers[-1].close)
        if servers:
            table.head(servers)
            for served in load.served():
                table.add(served, servers)
    results.finish()


if __name__ == "__main__":
    main()
