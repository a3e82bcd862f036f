"""Structured output: what of schemas is kept, and what it costs.

    python -m benchmarks.structured                     # what it costs an engine
    python -m benchmarks.structured --schemas DIR       # what of a folder of schemas is kept

DIR holds JSON files, {"schema": ..., "tests": [{"valid": bool, "data": ...}]} each, as MaskBench's
do, or lists of such objects; tests/grammar/cases is one. An instance is written by Python's json
and accepted where every token of it is and the text may then end. The engine's figures are of sides
that take turns in one process: one request free and constrained, and 64 of which none or half are;
then records in JSON, with tokens that the schema forces drawn one by one, and not. The last line is
JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks import models
from benchmarks.results import Results, add_options
from minisgl.build import BUNDLED_MODEL, build_engine
from minisgl.config import EngineConfig
from minisgl.core.grammar import Wanted
from minisgl.core.request import Request, SamplingParams
from minisgl.engine.engine import Engine
from minisgl.grammar.backend import LlgBackend
from minisgl.server.tokenizer import Tokenizer

# Values that never come to an end: what is measured is as long as what it is compared with.
ENDLESS = {
    "type": "array",
    "minItems": 10_000,
    "items": {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
}


# A record as programs ask for them: long names, short values.
RECORD = {
    "type": "object",
    "properties": {
        "customer_name": {"type": "string", "maxLength": 16},
        "shipping_address": {
            "type": "object",
            "properties": {
                "street_name": {"type": "string", "maxLength": 16},
                "postal_code": {"type": "string", "pattern": "^[0-9]{5}$"},
            },
            "required": ["street_name", "postal_code"],
            "additionalProperties": False,
        },
        "payment_method": {"enum": ["credit_card", "bank_transfer", "cash_on_delivery"]},
        "number_of_items": {"type": "integer", "minimum": 1, "maximum": 99},
        "is_express": {"type": "boolean"},
    },
    "required": [
        "customer_name",
        "shipping_address",
        "payment_method",
        "number_of_items",
        "is_express",
    ],
    "additionalProperties": False,
}


@dataclass
class Verdict:
    """What became of one schema."""

    refusal: str | None = None
    accepted_invalid: list[Any] = field(default_factory=list)
    refused_valid: list[Any] = field(default_factory=list)
    compile_seconds: float = 0.0
    mask_seconds: list[float] = field(default_factory=list)


class Judge:
    """Compiles schemas and reads instances, with a tokenizer as a model has it."""

    def __init__(self, directory: Path) -> None:
        path = directory / "tokenizer.json"
        spelled = msgspec.json.decode(path.read_bytes())
        ids = [*spelled["model"]["vocab"].values()] if "model" in spelled else []
        ids += [each["id"] for each in spelled.get("added_tokens", ())]
        self.vocab_size = max(ids) + 1
        self._tokenizer = Tokenizer.from_directory(directory)
        self._end = self._tokenizer.eos_token_id
        if self._end is None:
            raise SystemExit(f"{directory} names no end-of-text token")
        self.backend = LlgBackend(
            lambda: self._tokenizer,
            self.vocab_size,
            [self._end],
            timeout=600.0,
            max_bytes=2**20,
            cache_bytes=1,
        )
        self.backend.compile('{"json": {"const": 0}}').result()  # the tokenizer is read

    def judge(self, case: dict[str, Any]) -> Verdict:
        verdict, started = Verdict(), time.perf_counter()
        try:
            grammar = self.backend.compile(json.dumps({"json": case["schema"]})).result()
        except ValueError as error:
            verdict.refusal = str(error)
        verdict.compile_seconds = time.perf_counter() - started
        if verdict.refusal is None:
            for test in case["tests"]:
                accepted = self._reads(grammar.copy(), test["data"], verdict.mask_seconds)
                if accepted != test["valid"]:
                    wrong = verdict.refused_valid if test["valid"] else verdict.accepted_invalid
                    wrong.append(test["data"])
        return verdict

    def _reads(self, grammar: Any, data: Any, seconds: list[float]) -> bool:
        text = json.dumps(data, ensure_ascii=False)
        bits = np.empty((1, (self.vocab_size + 31) // 32), np.uint32)
        for token_id in [*self._tokenizer.encode(text, add_special_tokens=False), self._end]:
            assert token_id is not None
            started = time.perf_counter()
            failed = self.backend.fill_masks([Wanted(grammar, 0, [])], bits)
            seconds.append(time.perf_counter() - started)
            allowed = not failed and bool(bits[0, token_id >> 5] >> np.uint32(token_id & 31) & 1)
            if (grammar.accept(token_id) is None) != allowed:
                raise SystemExit(f"a mask and its grammar differ at token {token_id} of {text}")
            if not allowed:
                return False
        return True


def cases(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema of a folder with its instances, and a name."""
    for path in sorted(folder.rglob("*.json")):
        found = json.loads(path.read_text())
        for index, case in enumerate(found if isinstance(found, list) else [found]):
            name = path.stem if not isinstance(found, list) else f"{path.stem}[{index}]"
            yield name, case


def judge_all(folder: Path, tokenizer: Path, results: Results, show: bool) -> None:
    judge, verdicts = Judge(tokenizer), []
    for name, case in cases(folder):
        if results.is_late(name):
            break
        verdicts.append((name, judge.judge(case), case))
    judge.backend.close()
    kept = [verdict for _, verdict, _ in verdicts if verdict.refusal is None]
    judged = [case["tests"] for _, verdict, case in verdicts if verdict.refusal is None]
    tests = [test["valid"] for each in judged for test in each]
    masks = [1e6 * s for verdict in kept for s in verdict.mask_seconds] or [0.0]
    compiles = [1e3 * verdict.compile_seconds for _, verdict, _ in verdicts] or [0.0]
    figures: dict[str, Any] = {
        "schemas": len(verdicts),
        "refused": len(verdicts) - len(kept),
        "invalid_instances": tests.count(False),
        "accepted_invalid": sum(len(verdict.accepted_invalid) for verdict in kept),
        "valid_instances": tests.count(True),
        "refused_valid": sum(len(verdict.refused_valid) for verdict in kept),
        "vocabulary": judge.vocab_size,
    }
    for unit, values in (("compile_ms", compiles), ("mask_us", masks)):
        p50, p99 = np.percentile(values, [50, 99])
        figures |= {f"{unit}_p50": round(p50, 2), f"{unit}_p99": round(p99, 2)}
        figures[f"{unit}_most"] = round(max(values), 2)
    for name, value in figures.items():
        print(f"{name:20s} {value:10g}")
    for name, verdict, _ in verdicts if show else ():
        for what in ("refusal", "accepted_invalid", "refused_valid"):
            if found := getattr(verdict, what):
                print(f"{name}: {what}: {json.dumps(found, ensure_ascii=False)[:200]}")
    results.put(**figures)


def requests(free: int, constrained: int, tokens: int, name: str) -> list[Request]:
    prompt = list(range(5, 21))
    spec = json.dumps({"json": ENDLESS})
    plain = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=1.0, seed=1)
    formed = SamplingParams(max_tokens=tokens, temperature=1.0, seed=1, structured_outputs=spec)
    every = [plain] * free + [formed] * constrained
    return [Request(f"{name}-{i}", [*prompt, 30 + i], each) for i, each in enumerate(every)]


def decode_seconds(engine: Engine, asked: list[Request]) -> list[float]:
    """What steps take in which all of these decode."""
    for request in asked:
        engine.add(request)
    begun: set[str] = set()
    took = []
    while engine.has_work():
        started = time.perf_counter()
        deltas = engine.step()
        seconds = time.perf_counter() - started
        if len(begun) == len(asked) and len(deltas) == len(asked):
            took.append(seconds)
        begun |= {delta.request_id for delta in deltas if delta.token_ids}
        if bad := next((d for d in deltas if d.error or d.finish_reason == "stop"), None):
            raise SystemExit(f"{bad.request_id} ended early: {bad.error or 'stop'}")
    return took[4:-4]


def records(count: int, name: str) -> list[Request]:
    """Requests for a record each, all with seeds of their own."""
    spec, asked = json.dumps({"json": RECORD}), []
    for i in range(count):
        params = SamplingParams(max_tokens=400, temperature=0.7, seed=i, structured_outputs=spec)
        asked.append(Request(f"{name}-{i}", [*range(5, 21), 30 + i], params))
    return asked


def serve(engine: Engine, asked: list[Request]) -> tuple[dict[str, list[int]], float, int]:
    """What is answered, in how many seconds and in how many steps."""
    answers: dict[str, list[int]] = {request.id: [] for request in asked}
    begun, started = engine.stats().steps, time.perf_counter()
    for request in asked:
        engine.add(request)
    while engine.has_work():
        for delta in engine.step():
            answers[delta.request_id] += delta.token_ids
            if delta.error:
                raise SystemExit(f"{delta.request_id}: {delta.error}")
    return answers, time.perf_counter() - started, engine.stats().steps - begun


def measure_forced(args: argparse.Namespace, results: Results) -> None:
    """Records, one after another and `--together` at once, with and without forced tokens."""
    sides = {"drawn": {"disable_forced_tokens": True}, "forced": {}}
    engines = {name: open_engine(args, **options) for name, options in sides.items()}
    for together in (1, args.together):
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        forced = dict.fromkeys(sides, 0)
        for turn in range(args.rounds + 1):
            for name, engine in engines.items():
                before = engine.stats().scheduler.num_forced_tokens
                asked = records(max(8, together), f"{name} {together} {turn}")
                parts = [
                    serve(engine, asked[i : i + together]) for i in range(0, len(asked), together)
                ]
                tokens = sum(len(ids) for answers, _, _ in parts for ids in answers.values())
                seconds, steps = sum(part[1] for part in parts), sum(part[2] for part in parts)
                forced[name] = engine.stats().scheduler.num_forced_tokens - before
                if turn:
                    found[name].append((1e3 * seconds / tokens, tokens / steps))
        for name, each in found.items():
            ms, per_step = (statistics.median(values) for values in zip(*each, strict=True))
            print(
                f"{together} at once, {name}: {ms:.3f} ms a token, {per_step:.3f} tokens a step, "
                f"{forced[name]} of {tokens} not drawn"
            )
            results.add("records", {"together": together, "side": name, "ms_and_tokens": each})
    for engine in engines.values():
        engine.close()


def open_engine(args: argparse.Namespace, **options: Any) -> Engine:
    with models.chosen(args) as (model, load_format):
        config = EngineConfig(
            model=model,
            load_format=load_format,
            device=args.device,
            max_total_tokens=64 * (args.tokens + 64),
            max_running_requests=64,
            log_level="warning",
            **options,
        )
        return build_engine(config)


def measure_engine(args: argparse.Namespace, results: Results) -> None:
    engine = open_engine(args, disable_forced_tokens=True)  # a token of each in every step
    sides = {"1 free": (1, 0), "1 constrained": (0, 1), "64 free": (64, 0), "32 of 64": (32, 32)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(args.rounds + 1):
        for name, (free, constrained) in sides.items():
            asked = requests(free, constrained, args.tokens, f"{name} {turn}")
            took = decode_seconds(engine, asked)
            if turn:  # the first compiles and warms up
                times[name].append(1e3 * statistics.median(took))
    engine.close()
    for name, found in times.items():
        each = ", ".join(f"{value:.3f}" for value in found)
        print(f"{name:14s} {min(found):8.3f} ms a step at best, by turn {each}")
        results.add("steps", {"side": name, "ms": found})
    for name, plain in (("1 constrained", "1 free"), ("32 of 64", "64 free")):
        ratios = [a / b for a, b in zip(times[name], times[plain], strict=True)]
        print(f"{name}: {statistics.median(ratios):.3f} times {plain}, median of turns")
        results.put(**{f"{name} over {plain}": ratios})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemas", type=Path, help="judge this folder, and only this")
    parser.add_argument("--tokenizer", type=Path, default=BUNDLED_MODEL, help="its folder")
    parser.add_argument("--show", action="store_true", help="every refusal and wrong verdict")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--together", type=int, default=16, help="records at once")
    parser.add_argument("--part", choices=["all", "masks", "forced"], default="all")
    parser.add_argument("--device", default="auto")
    models.add_options(parser)
    add_options(parser)
    args = parser.parse_args()
    results = Results("structured", args)
    if args.schemas is not None:
        judge_all(args.schemas, args.tokenizer, results, args.show)
    else:
        results.put(model=models.name(args), device=args.device)
        if args.part != "forced":
            measure_engine(args, results)
        if args.part != "masks":
            measure_forced(args, results)
    results.finish()


if __name__ == "__main__":
    main()
