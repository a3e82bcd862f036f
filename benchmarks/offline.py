"""Offline throughput: many requests of random lengths at once, every token counted.

    python -m benchmarks.offline                                   # 256 requests, bundled model
    python -m benchmarks.offline --shape qwen3-0.6b --num-requests 16 \\
        --input-len 32 256 --output-len 32 128 --engine minisgl transformers --rounds 3

The workload is the one nano-vllm and mini-sglang publish: prompts and outputs of uniformly random
length, random token ids, end-of-sequence ignored, seeded. Engines named together run in turns,
each round in a new process, so that both meet the same machine; loading and a warm-up are not
timed. The last line is JSON.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import models
from benchmarks.results import Results, add_options

Workload = list[tuple[list[int], int]]  # prompt ids and output length, per request
Run = Callable[[Workload], list[int]]  # returns the output length of each request


def make_workload(args: argparse.Namespace, vocab_size: int) -> Workload:
    generator = random.Random(args.seed)
    top = min(vocab_size, 10_000)
    work = []
    for _ in range(args.num_requests):
        length = generator.randint(*args.input_len)
        prompt = [generator.randrange(top) for _ in range(length)]
        work.append((prompt, generator.randint(*args.output_len)))
    return work


def open_minisgl(args: argparse.Namespace) -> tuple[Run, int]:
    from minisgl import LLM, SamplingParams

    options = {"max_total_tokens": args.max_total_tokens} if args.max_total_tokens else {}
    options |= {"load_format": args.load_format, "dtype": args.dtype, "device": args.device}
    llm = LLM(args.model, **options)

    def run(work: Workload) -> list[int]:
        params = [
            SamplingParams(temperature=args.temperature, ignore_eos=True, max_tokens=length)
            for _, length in work
        ]
        prompts = [prompt for prompt, _ in work]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [len(output.token_ids) for output in outputs]

    return run, llm.info.limits.vocab_size


def open_transformers(args: argparse.Namespace) -> tuple[Run, int]:
    """transformers' `generate` on one left-padded batch, which runs until its longest output."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    path = args.model or str(Path(__file__).parents[1] / "minisgl/assets/tiny")
    config = AutoConfig.from_pretrained(path)
    dtype = {"auto": config.dtype or torch.bfloat16}.get(args.dtype) or getattr(torch, args.dtype)
    if args.load_format == "dummy":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.to_empty(device="cpu")
        model.init_weights()
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = found if args.device == "auto" else args.device
    model.to(device).eval()

    def run(work: Workload) -> list[int]:
        width, longest = max(len(p) for p, _ in work), max(length for _, length in work)
        ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in work], device=device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in work])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=mask.to(device),
                do_sample=args.temperature > 0,
                temperature=args.temperature or None,
                min_new_tokens=longest,
                max_new_tokens=longest,
                pad_token_id=0,
            )
        return [min(length, out.shape[1] - width) for _, length in work]

    return run, config.vocab_size


ENGINES = {"minisgl": open_minisgl, "transformers": open_transformers}


def measure(args: argparse.Namespace) -> None:
    """One round of one engine, in its own process: print its figures as JSON."""
    run, vocab_size = ENGINES[args.engine[0]](args)
    work = make_workload(args, vocab_size)
    run([(prompt[:16], 4) for prompt, _ in work[:2]])
    started, used = time.perf_counter(), time.process_time()
    lengths = run(work)
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    if lengths != [length for _, length in work]:
        raise SystemExit(f"{args.engine[0]} did not give every request its output length")
    prompts = sum(len(prompt) for prompt, _ in work)
    figures = {"seconds": seconds, "cpu": cpu, "output": sum(lengths), "prompt": prompts}
    print(json.dumps(figures))


def run_once(engine: str) -> dict[str, float]:
    """One round, in a process of its own with this one's options."""
    command = [sys.executable, "-m", "benchmarks.offline", "--child", engine, *sys.argv[1:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def summary(rounds: dict[str, list[dict[str, float]]]) -> dict[str, object]:
    """Medians, and the ratio where there are two engines."""
    speeds = {
        engine: statistics.median(r["output"] / r["seconds"] for r in results)
        for engine, results in rounds.items()
    }
    result: dict[str, object] = {
        "output_tokens_per_second": {name: round(speed, 2) for name, speed in speeds.items()}
    }
    if len(speeds) == 2:
        ours, theirs = speeds.values()
        mine, others = ([r["cpu"] for r in results] for results in rounds.values())
        result["ratio"] = round(ours / theirs, 3)
        result["cpu_ratio"] = round(statistics.median(others) / statistics.median(mine), 3)
    return result


def report(args: argparse.Namespace) -> None:
    load = os.getloadavg()[0]  # a busy machine's figures mean little
    results = Results("offline", args)
    results.put(
        model=models.name(args),
        requests=args.num_requests,
        load_before=round(load, 1),
    )
    rounds: dict[str, list[dict[str, float]]] = {engine: [] for engine in args.engine}
    for turn in range(args.rounds):
        if turn and results.is_late(f"round {turn}"):
            break
        for engine in args.engine:
            rounds[engine].append(run_once(engine))
        results.put(rounds=turn + 1, **summary(rounds))
    first, count = rounds[args.engine[0]][0], results.content["rounds"]
    print(f"{args.num_requests} requests, {first['prompt']:.0f} prompt tokens, ", end="")
    print(f"{first['output']:.0f} output tokens, median of {count} round(s)")
    print(f"before it, {load:.1f} tasks wanted the {os.cpu_count()} cores")
    for engine, speed in results.content["output_tokens_per_second"].items():
        total = speed * (1 + first["prompt"] / first["output"])
        cores = statistics.median(r["cpu"] / r["seconds"] for r in rounds[engine])
        print(f"{engine:<14}{speed:>10.1f} output tok/s{total:>12.1f} tok/s with prompts", end="")
        print(f"{cores:>8.2f} cores busy")
    if "ratio" in results.content:
        pairs = zip(*rounds.values(), strict=True)
        each = [right["seconds"] / left["seconds"] for left, right in pairs]
        print(f"{' / '.join(rounds)}: {results.content['ratio']:.2f}x", end="")
        print(f" ({min(each):.2f}-{max(each):.2f} by round), ", end="")
        by_cpu = results.content["cpu_ratio"]
        print(f"{by_cpu:.2f}x by CPU seconds, which a busy machine disturbs less")
    results.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models.add_options(parser)
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=["minisgl"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--num-requests", type=int, default=256)
    parser.add_argument("--input-len", type=int, nargs=2, default=[100, 1024], metavar="N")
    parser.add_argument("--output-len", type=int, nargs=2, default=[100, 1024], metavar="N")
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--max-total-tokens", type=int, help="KV pool of minisgl")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--child", choices=ENGINES, help=argparse.SUPPRESS)
    add_options(parser)
    args = parser.parse_args()
    if args.child is None:
        report(args)
        return
    args.engine = [args.child]
    with models.chosen(args) as (args.model, args.load_format):
        measure(args)


if __name__ == "__main__":
    main()
