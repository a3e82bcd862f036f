"""One user, a prompt and many requests on a CPU, beside other engines or another commit.

    python -m benchmarks.cpu --shape qwen3-0.6b --against ../before
    python -m benchmarks.cpu --model M --engine transformers vllm=VLLM/bin/python \\
        openvino=OV/bin/python:M_openvino

The first compares with another checkout of minisgl, the second with engines that may have a Python,
and a folder of the model, of their own.

First the limits of the machine: how fast its threads read memory and multiply bf16 matrices. Then
every engine is loaded, each in its own process, and they answer in turns, so that all meet the same
machine. Those that wait are stopped: vLLM keeps a core busy for a second after its last answer.
Prompts are random and never repeat. Rows are medians of the rounds: a decode step is (time of N + 1
tokens less time of 1) / N after a prompt of 32. `others` is the share of a core that other programs
used meanwhile: figures of a busy machine mean little. The last line is JSON.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks import models
from benchmarks.results import ROOT, Results, add_options

LIMITS = """
import json, time, torch
def best(call, work):
    call()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return work / min(times) / 1e9
numbers, square = torch.ones(1 << 28), torch.randn(2048, 2048, dtype=torch.bfloat16)
print(json.dumps({
    "threads": torch.get_num_threads(),
    "read_gb_per_s": round(best(numbers.sum, numbers.nbytes), 1),
    "bf16_gflop_per_s": round(best(lambda: square @ square, 2 * 2048**3)),
}))
"""


class Engine:
    """A process that has loaded the model and waits for questions."""

    def __init__(self, name: str, python: str, tree: Path, engine: str, model: str) -> None:
        self.name = name
        script = str(Path(__file__).with_name("cpu_engines.py"))
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        self._process = subprocess.Popen(
            [python, script, engine, model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tree,
            start_new_session=True,  # some have processes of their own, which end with it
        )
        self.release = str(self._answer()["release"])
        self._signal(signal.SIGSTOP)

    def seconds(self, prompts: list[list[int]], outputs: list[int]) -> float:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        print(
            json.dumps({"prompts": prompts, "outputs": outputs}),
            file=self._process.stdin,
            flush=True,
        )
        seconds = float(self._answer()["seconds"])
        self._signal(signal.SIGSTOP)
        return seconds

    def _answer(self) -> dict[str, float | str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} has ended: rc {self._process.wait()}")
        found: dict[str, float | str] = json.loads(line)
        return found

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)

    def close(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()


class Load:
    """Random prompts and what is asked of them."""

    def __init__(self, args: argparse.Namespace, vocab: int) -> None:
        self._args = args
        self._vocab = min(vocab, 10_000)
        self._random = random.Random(args.seed)
        lengths = random.Random(args.seed)  # the same in every round, for every engine
        pairs = [
            (lengths.randint(*args.input_len), lengths.randint(*args.output_len))
            for _ in range(args.num_requests)
        ]
        self._inputs, self._outputs = map(list, zip(*pairs, strict=True))

    def _prompt(self, length: int) -> list[int]:
        return [self._random.randrange(16, self._vocab) for _ in range(length)]

    def decode(self, engine: Engine) -> float:
        """Milliseconds a token, for one user."""
        prompt, count = self._prompt(32), self._args.decode_tokens
        first = engine.seconds([prompt], [1])
        return (engine.seconds([prompt], [1 + count]) - first) / count * 1e3

    def prefill(self, engine: Engine) -> float:
        """Prompt tokens a second."""
        length = self._args.prompt_tokens
        return length / engine.seconds([self._prompt(length)], [1])

    def many(self, engine: Engine) -> float:
        """Output tokens a second of many requests at once."""
        prompts = [self._prompt(length) for length in self._inputs]
        return sum(self._outputs) / engine.seconds(prompts, self._outputs)


def cpu_seconds() -> tuple[float, float]:
    """Of all programs, and of this one with its children that are alive."""
    tick = os.sysconf("SC_CLK_TCK")
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    everyone = sum(map(int, fields)) - int(fields[3]) - int(fields[4])  # less idle, and waiting
    own, parents = 0, {os.getpid()}
    for folder in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            parts = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has ended
        if int(folder.name) in parents or int(parts[1]) in parents:
            parents.add(int(folder.name))
            own += int(parts[11]) + int(parts[12])
    return everyone / tick, own / tick


def started(args: argparse.Namespace, model: str, stack: ExitStack) -> list[Engine]:
    asked = [("minisgl", sys.executable, ROOT, "minisgl", model)]
    if args.against is not None:
        before = Path(args.against).absolute()
        asked.append((before.name, sys.executable, before, "minisgl", model))
    for text in args.engine:
        name, _, rest = text.partition("=")
        python, _, own_model = rest.partition(":")
        asked.append((name, python or sys.executable, ROOT, name, own_model or model))
    engines = []
    for facts in asked:
        engines.append(Engine(*facts))
        stack.callback(engines[-1].close)
    return engines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_options(parser)
    parser.add_argument("--against", help="another checkout of minisgl, measured beside this one")
    parser.add_argument(
        "--engine",
        nargs="*",
        default=[],
        help="of transformers, vllm and openvino, each as NAME[=PYTHON[:MODEL]]",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--decode-tokens", type=int, default=64, help="of one user")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--num-requests", type=int, default=16)
    parser.add_argument("--input-len", type=int, nargs=2, default=[32, 256])
    parser.add_argument("--output-len", type=int, nargs=2, default=[32, 128])
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
        engines, load = started(args, str(path), stack), Load(args, vocab)
        results.put(releases={engine.name: engine.release for engine in engines})
        rows: dict[str, tuple[Callable[[Engine], float], bool]] = {
            "decode, ms a token": (load.decode, False),
            f"prompt of {args.prompt_tokens}, tok/s": (load.prefill, True),
            f"{args.num_requests} requests, output tok/s": (load.many, True),
        }
        width = max(map(len, rows))
        names = "".join(f"{engine.name:>16}" for engine in engines)
        print(f"{'':<{width}}{names}  others  minisgl faster than each", flush=True)
        for title, (measure, more_is_better) in rows.items():
            if results.is_late(title):
                break
            for engine in engines:
                measure(engine)  # warm
            began, (all_before, own_before) = time.perf_counter(), cpu_seconds()
            found: dict[str, list[float]] = {engine.name: [] for engine in engines}
            for _ in range(args.rounds):
                for engine in engines:
                    found[engine.name].append(measure(engine))
            all_after, own_after = cpu_seconds()
            others = (all_after - all_before) - (own_after - own_before)
            share = max(others, 0.0) / (time.perf_counter() - began)
            medians = {name: statistics.median(values) for name, values in found.items()}
            ours, *theirs = medians.values()
            ratios = [ours / other if more_is_better else other / ours for other in theirs]
            shown = "".join(f"{value:>16,.2f}" for value in medians.values())
            faster = ", ".join(f"{ratio:.2f}x" for ratio in ratios)
            print(f"{title:<{width}}{shown}  {share:>6.2f}  {faster}", flush=True)
            spans = {name: [round(min(v), 3), round(max(v), 3)] for name, v in found.items()}
            row = {"row": title, "others": round(share, 2), "range": spans}
            row |= {"median": {name: round(value, 3) for name, value in medians.items()}}
            results.add("rows", {**row, "faster": [round(ratio, 3) for ratio in ratios]})
    results.finish()


if __name__ == "__main__":
    main()
