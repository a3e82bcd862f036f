"""Overlap scheduling on against off: the same requests, in turns, in one process.

    python -m benchmarks.overlap                          # the bundled model
    python -m benchmarks.overlap --model DIR --batch 1 16 64 --rounds 7

Two engines are built from the same config but for `disable_overlap_schedule`. Every round runs the
same requests on both, in alternating order, and gives one ratio of throughputs; the median over
the rounds is reported. Both must return the same number of tokens, and in fp32 the same tokens,
before anything is timed. On a GPU the ratio says how much of the planning is hidden; on a CPU the
planner and the model share cores, and it should be close to 1. The last line is JSON.
"""

import argparse
import json
import os
import random
import statistics
import time
from dataclasses import replace

from minisgl.build import build_engine
from minisgl.config import EngineConfig
from minisgl.core.request import Request, SamplingParams
from minisgl.engine.engine import Engine

VARIANTS = ("on", "off")


def make_requests(batch: int, args: argparse.Namespace, vocab: int, tag: str) -> list[Request]:
    generator = random.Random(args.seed)
    return [
        Request(
            f"{tag}-{i}",
            [generator.randrange(vocab) for _ in range(args.input_len)],
            SamplingParams(
                max_tokens=args.output_len, ignore_eos=True, temperature=args.temperature, seed=i
            ),
        )
        for i in range(batch)
    ]


def serve(engine: Engine, requests: list[Request]) -> tuple[float, dict[str, list[int]]]:
    """Seconds, and the tokens of each request."""
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    begin = time.perf_counter()
    for request in requests:
        engine.add(request)
    while engine.has_work():
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
    seconds = time.perf_counter() - begin
    if engine.failure is not None:
        raise RuntimeError(engine.failure)
    return seconds, tokens


def check(engines: dict[str, Engine], batch: int, args: argparse.Namespace) -> None:
    """Also the warm-up. Raises RuntimeError when the two do not do the same work."""
    outputs = {}
    for name, engine in engines.items():
        requests = make_requests(batch, args, engine.info.limits.vocab_size, f"check-{batch}")
        outputs[name] = serve(engine, requests)[1]
    if any(len(tokens) != args.output_len for out in outputs.values() for tokens in out.values()):
        raise RuntimeError(f"not every request got its {args.output_len} tokens")
    if engines["on"].info.dtype == "float32" and outputs["on"] != outputs["off"]:
        raise RuntimeError("the tokens differ with and without overlap")


def measure(engines: dict[str, Engine], batch: int, args: argparse.Namespace) -> dict[str, float]:
    """Median throughputs and their median ratio."""
    speeds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(args.rounds):
        for name in VARIANTS[:: -1 if turn % 2 else 1]:
            engine = engines[name]
            vocab = engine.info.limits.vocab_size
            requests = make_requests(batch, args, vocab, f"{batch}-{turn}")
            speeds[name].append(batch * args.output_len / serve(engine, requests)[0])
    ratios = [on / off for on, off in zip(speeds["on"], speeds["off"], strict=True)]
    return {
        "batch": batch,
        "on_tokens_per_s": statistics.median(speeds["on"]),
        "off_tokens_per_s": statistics.median(speeds["off"]),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="directory or hub id; the bundled model when absent")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--input-len", type=int, default=32)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    config = EngineConfig(
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        load_format=args.load_format,
        max_running_requests=max(args.batch),
        max_total_tokens=max(args.batch) * (args.input_len + args.output_len + 32),
        disable_radix_cache=True,  # the same prompts are served again and again
    )
    engines: dict[str, Engine] = {}
    try:
        engines["on"] = build_engine(config)
        engines["off"] = build_engine(replace(config, disable_overlap_schedule=True))
        info = engines["on"].info
        rows = []
        print(f"{info.model} {info.dtype} on {info.device}; output tokens/s")
        print(f"{'batch':>6} {'overlap':>10} {'without':>10} {'ratio':>7}   (lowest to highest)")
        for batch in args.batch:
            check(engines, batch, args)
            row = measure(engines, batch, args)
            rows.append(row)
            print(
                f"{batch:>6} {row['on_tokens_per_s']:>10.1f} {row['off_tokens_per_s']:>10.1f} "
                f"{row['ratio']:>7.3f}   ({row['ratio_min']:.3f} to {row['ratio_max']:.3f})"
            )
    finally:
        for engine in engines.values():
            engine.close()
    load = os.getloadavg()[0]
    print(
        json.dumps(
            {
                "benchmark": "overlap",
                "model": info.model,
                "device": info.device,
                "dtype": info.dtype,
                "rounds": args.rounds,
                "load": load,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    main()
