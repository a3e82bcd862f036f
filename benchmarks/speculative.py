"""Speculative decoding against plain decoding: acceptance, tokens per target step, speed.

Acceptance is the share of drafts that equal the target's own sample, of those before and at the
first of a step that does not. Tokens per target step are those of one sequence.

    python -m benchmarks.speculative                  # a memory-bound target of 0.6B parameters
    python -m benchmarks.speculative --target tiny    # the bundled model itself
    python -m benchmarks.speculative --equality 500   # the same tokens with and without, in fp32

The default target is the bundled model made large: wider MLPs and more layers that add nothing,
all padding being zero where it would be heard. It says what the small one says, asserted, and
costs what a model of its size costs. Chats are what the bundled pair was made for; edits, for
n-gram lookup, have the model say again what it was told. Each side runs in a process of its own, in
turns, at the same batch sizes. The last line is JSON.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.results import ROOT, Results, add_options

BUNDLED = ROOT / "minisgl" / "assets" / "tiny"
SIDES: dict[str, dict[str, Any]] = {
    "plain": {},
    "draft": {"speculative_algorithm": "draft", "speculative_draft_model": "tiny-draft"},
    "ngram": {"speculative_algorithm": "ngram"},
}
KINDS = {"chat": ("story", "addition", "fact", "extraction"), "edit": ("echo", "extraction")}
MAX_TOKENS = 96


def questions(count: int, workload: str, seed: int = 0) -> list[str]:
    """What users say, drawn as the bundled model's training drew it."""
    from tools.train_tiny import corpus

    rng = random.Random(f"{workload}-{seed}")
    kinds = KINDS[workload]
    return [corpus.TURNS[kinds[i % len(kinds)]](rng)[0] for i in range(count)]


def write_padded(folder: Path, layers: int, inner: int) -> int:
    """The bundled model with `layers` layers and MLPs of width `inner`; returns its parameters.

    Further rows of gate and up, and further layers, are random: what reads them is zero.
    """
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((BUNDLED / "config.json").read_text())
    own = config["num_hidden_layers"]
    config |= {"num_hidden_layers": layers, "intermediate_size": inner}
    (folder / "config.json").write_text(json.dumps(config))
    for file in BUNDLED.glob("*.json"):
        if file.name != "config.json":
            (folder / file.name).write_bytes(file.read_bytes())
    small = load_file(BUNDLED / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    made: dict[str, torch.Tensor] = {}
    for name, tensor in small.items():
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            wide = torch.randn(inner, tensor.shape[1], generator=generator).to(tensor.dtype)
            wide[: tensor.shape[0]] = tensor
            tensor = wide
        elif name.endswith("down_proj.weight"):
            wide = tensor.new_zeros(tensor.shape[0], inner)
            wide[:, : tensor.shape[1]] = tensor
            tensor = wide
        made[name] = tensor
    first = [name for name in made if name.startswith("model.layers.0.")]
    for layer in range(own, layers):
        for name in first:
            tensor = made[name].clone()
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor.zero_()
            made[name.replace("layers.0.", f"layers.{layer}.")] = tensor
    save_file(made, folder / "model.safetensors")
    return sum(tensor.numel() for tensor in made.values())


# ---- one side, in its own process -------------------------------------------------------------


def serve_side(side: str, options: dict[str, Any]) -> None:
    """Answer lines of JSON (prompts, batch, temperature) with what was measured."""
    from minisgl import LLM, SamplingParams

    drafts = options.pop("speculative_num_draft_tokens")
    if SIDES[side]:
        options["speculative_num_draft_tokens"] = drafts
    with LLM(**options, **SIDES[side], log_level="warning") as llm:
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            job = json.loads(line)
            before, started, used = llm.stats(), time.perf_counter(), time.process_time()
            said = []
            for first in range(0, len(job["prompts"]), job["batch"]):
                group = job["prompts"][first : first + job["batch"]]
                params = [
                    SamplingParams(
                        temperature=job["temperature"], max_tokens=job["max_tokens"], seed=first + i
                    )
                    for i in range(len(group))
                ]
                chats = [[{"role": "user", "content": text}] for text in group]
                outputs = llm.chat(chats, params, use_tqdm=False)
                assert isinstance(outputs, list)  # of a list of chats
                said += [output.token_ids for output in outputs]
            seconds, after = time.perf_counter() - started, llm.stats()
            used = time.process_time() - used
            tried = after.scheduler.num_tried_drafts - before.scheduler.num_tried_drafts
            accepted = after.scheduler.num_accepted_drafts - before.scheduler.num_accepted_drafts
            answer = {"seconds": seconds, "cpu_seconds": used, "tried": tried}
            print(json.dumps(answer | {"accepted": accepted, "tokens": said}), flush=True)


class Side:
    """The process of one side."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "benchmarks.speculative", "--side", name]
        self._process = subprocess.Popen(
            [*command, "--options", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a side ended with exit status {self._process.wait()}")
        return json.loads(line)

    def ask(self, prompts: Sequence[str], batch: int, **job: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        job = {"temperature": 0.0, "max_tokens": MAX_TOKENS} | job
        print(json.dumps(job | {"prompts": prompts, "batch": batch}), file=self._process.stdin)
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


@contextmanager
def sides(names: Sequence[str], options: dict[str, Any]) -> Iterator[dict[str, Side]]:
    with ExitStack() as stack:
        made = {}
        for name in names:
            made[name] = Side(name, options)
            stack.callback(made[name].close)
        yield made


# ---- what is measured -------------------------------------------------------------------------


@dataclass
class Result:
    """One workload at one batch size and temperature, a side against the plain one."""

    workload: str
    side: str
    batch: int
    temperature: float
    acceptance: float
    tokens_per_step: float
    ratios: list[float]  # of speeds, one a round
    cpu_ratio: float  # of processor time, all rounds together: a busy machine disturbs it less

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    def line(self) -> str:
        spread = f"{min(self.ratios):.2f}-{max(self.ratios):.2f}"
        return (
            f"{self.workload:8} {self.side:6} {self.batch:5} {self.temperature:11g} "
            f"{self.acceptance:10.1%} {self.tokens_per_step:11.2f} {self.cpu_ratio:7.2f}x "
            f"{self.ratio:7.2f}x  ({spread})"
        )


def compare(
    running: dict[str, Side],
    workload: str,
    batch: int,
    temperature: float,
    requests: int,
    rounds: int,
) -> list[Result]:
    """All sides on the same requests, in turns. Fails where one says something else."""
    prompts = questions(max(requests, batch), workload, seed=batch)
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    for _ in range(rounds):
        for name, side in running.items():
            answers[name].append(side.ask(prompts, batch, temperature=temperature))
    plain = answers["plain"]
    results = []
    for name, own in answers.items():
        if name == "plain":
            continue
        agreed = [a["tokens"] == b["tokens"] for a, b in zip(own, plain, strict=True)]
        if not all(agreed):
            raise SystemExit(f"{name} says something else than plain decoding ({workload})")
        tried, accepted = (sum(a[key] for a in own) for key in ("tried", "accepted"))
        tokens = sum(len(said) for a in own for said in a["tokens"])
        results.append(
            Result(
                workload,
                name,
                batch,
                temperature,
                accepted / max(tried, 1),
                tokens / (tokens - accepted),
                [p["seconds"] / a["seconds"] for p, a in zip(plain, own, strict=True)],
                sum(p["cpu_seconds"] for p in plain) / sum(a["cpu_seconds"] for a in own),
            )
        )
    return results


def check_equality(running: dict[str, Side], count: int) -> None:
    """`count` prompts, greedy and seeded at temperature 1, with every proposer."""
    prompts = questions(count, "chat", seed=1)
    for temperature in (0.0, 1.0):
        said = {}
        for name, side in running.items():
            answer = side.ask(prompts, 16, temperature=temperature, max_tokens=48)
            said[name] = answer["tokens"]
            print(
                f"temperature {temperature:g}, {name}: {len(prompts)} prompts, "
                f"{sum(map(len, said[name]))} tokens, "
                f"{answer['accepted']} drafts accepted of {answer['tried']} tried"
            )
        for name, tokens in said.items():
            differ = sum(a != b for a, b in zip(tokens, said["plain"], strict=True))
            if differ:
                raise SystemExit(f"{name}: {differ} of {count} answers differ from plain decoding")
    print("all answers are the same")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", choices=["padded", "tiny"], default="padded")
    parser.add_argument("--layers", type=int, default=48, help="of the padded target")
    parser.add_argument("--inner", type=int, default=16384, help="its MLP width")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--workload", choices=KINDS, nargs="+", default=list(KINDS))
    parser.add_argument("--against", choices=["draft", "ngram"], nargs="+", default=list(SIDES)[1:])
    parser.add_argument("--drafts", type=int, default=6, help="tokens drafted at most")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--equality", type=int, metavar="PROMPTS", help="check this, and only this")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--options", help=argparse.SUPPRESS)
    add_options(parser)
    args = parser.parse_args()
    if args.side is not None:
        serve_side(args.side, json.loads(args.options))
        return
    results = Results("speculative", args)
    options: dict[str, Any] = {
        "device": args.device,
        "dtype": "float32" if args.equality else args.dtype,
        "max_running_requests": max(args.batch),
        "max_total_tokens": 16384,
        "speculative_num_draft_tokens": args.drafts,
    }
    if args.equality:
        with sides(list(SIDES), options) as running:
            check_equality(running, args.equality)
        return
    with tempfile.TemporaryDirectory(prefix="minisgl-padded-") as folder:
        if args.target == "padded":
            parameters = write_padded(Path(folder), args.layers, args.inner)
            options["model"] = folder
            print(f"padded target: {parameters / 1e6:.0f} million parameters, {args.dtype}")
        results.put(target=args.target, dtype=args.dtype, rows=[])
        with sides(["plain", *args.against], options) as running:
            if args.target == "padded":
                prompts = questions(8, "chat", seed=2)
                small_options = {k: v for k, v in options.items() if k != "model"}
                with sides(["plain"], small_options) as small:
                    expected = small["plain"].ask(prompts, 8, max_tokens=24)["tokens"]
                if running["plain"].ask(prompts, 8, max_tokens=24)["tokens"] != expected:
                    raise SystemExit("the padded target says something else than the small one")
                print("the padded target says what the small one says")
            for side in running.values():  # warm, and its costs measured
                for batch in args.batch:
                    side.ask(questions(batch, "chat", seed=3), batch, max_tokens=48)
            header = "workload side   batch temperature acceptance tokens/step"
            print(f"{header} CPU time    speed  (rounds)")
            for workload, temperature, batch in product(
                args.workload, args.temperature, args.batch
            ):
                what = f"{workload}, temperature {temperature:g}, batch {batch}"
                if results.content["rows"] and results.is_late(what):
                    continue
                found = compare(running, workload, batch, temperature, args.requests, args.rounds)
                for result in found:
                    print(result.line(), flush=True)
                    results.add("rows", vars(result) | {"ratio": result.ratio})
    results.finish()


if __name__ == "__main__":
    main()
