"""Load over HTTP: time to first token, gaps, throughput, goodput of any OpenAI-like server.

    python -m minisgl.serve &
    python -m benchmarks.serving --concurrency 16 --num-requests 128        # closed loop
    python -m benchmarks.serving --rate 8 --num-requests 256                # Poisson arrivals
    python -m benchmarks.serving --url http://host:8000 --text --respect-eos

Prompts are random token ids (or words, with --text), lengths uniform, all seeded. A closed loop
keeps so many clients busy; Poisson arrivals come whether or not the server keeps up. Tokens are
counted by the server's own usage and, unless --respect-eos, must be as many as were asked for. The
last line is JSON.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.http_load import Client, Job, Outcome, percentile

WORDS = (
    *("time", "page", "token", "batch", "cache", "prompt", "step"),
    *("queue", "model", "stream", "tree", "copy", "plan", "order"),
)


def make_jobs(args: argparse.Namespace) -> list[Job]:
    generator = random.Random(args.seed)

    def prompt(length: int) -> list[int]:
        return [generator.randrange(*args.token_ids) for _ in range(length)]

    def written(ids: list[int]) -> str | list[int]:
        return " ".join(WORDS[i % len(WORDS)] for i in ids) if args.text else ids

    shared, at, jobs = prompt(args.shared_prefix), 0.0, []
    for _ in range(args.num_requests):
        ids = shared + prompt(generator.randint(*args.input_len))
        jobs.append(Job(written(ids), generator.randint(*args.output_len), at))
        if args.rate is not None:
            at += generator.expovariate(args.rate)
    return jobs


def summarize(outcomes: list[Outcome], seconds: float, args: argparse.Namespace) -> dict[str, Any]:
    good = [outcome for outcome in outcomes if outcome.error is None]
    if not good:
        raise SystemExit(f"no request succeeded; the first said: {outcomes[0].error}")
    series = {
        "ttft_ms": [outcome.ttft for outcome in good],
        "itl_ms": [gap for outcome in good for gap in outcome.gaps] or [0.0],
        "tpot_ms": [outcome.tpot for outcome in good],
        "latency_ms": [outcome.latency for outcome in good],
    }
    in_time = [
        outcome
        for outcome in good
        if outcome.ttft * 1e3 <= args.slo_ttft_ms and outcome.tpot * 1e3 <= args.slo_tpot_ms
    ]
    output = sum(outcome.output_tokens for outcome in good)
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(good),
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(good) / seconds, 3),
        "goodput_requests_per_second": round(len(in_time) / seconds, 3),
        "within_slo": round(len(in_time) / len(outcomes), 4),
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in good),
        "output_tokens": output,
        "output_tokens_per_second": round(output / seconds, 2),
        **{
            name: {
                "mean": round(statistics.fmean(values) * 1e3, 3),
                "p50": round(percentile(values, 0.50) * 1e3, 3),
                "p90": round(percentile(values, 0.90) * 1e3, 3),
                "p99": round(percentile(values, 0.99) * 1e3, 3),
            }
            for name, values in series.items()
        },
    }


def show(figures: dict[str, Any], args: argparse.Namespace, load: str) -> None:
    print(f"{figures['model']} at {args.url}, {load}")
    print(
        f"{figures['requests']} requests ({figures['failed']} failed), {figures['seconds']:.1f} s: "
        f"{figures['requests_per_second']:.2f} requests/s, "
        f"{figures['output_tokens_per_second']:.1f} output tokens/s"
    )
    print(
        f"goodput {figures['goodput_requests_per_second']:.2f} requests/s: "
        f"{100 * figures['within_slo']:.1f} % had TTFT <= {args.slo_ttft_ms:g} ms "
        f"and TPOT <= {args.slo_tpot_ms:g} ms"
    )
    print(f"{'':<12}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}")
    for name in ("ttft_ms", "itl_ms", "tpot_ms", "latency_ms"):
        row = "".join(f"{value:>10.2f}" for value in figures[name].values())
        print(f"{name:<12}{row}")


def connected(args: argparse.Namespace) -> Client:
    return Client(
        args.url,
        model=args.model or "",
        api_key=args.api_key,
        temperature=args.temperature,
        ignore_eos=not args.respect_eos,
    )


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    client, jobs = connected(args), make_jobs(args)
    try:
        await client.find_model()
    except OSError as fault:
        raise SystemExit(str(fault)) from None
    warm = await client.send(Job(jobs[0].prompt, jobs[0].max_tokens), time.perf_counter())
    if warm.error is not None:
        raise SystemExit(f"the warm-up request failed: {warm.error}")
    start = time.perf_counter()
    if args.rate is not None:
        outcomes = await client.open_loop(jobs)
    else:
        outcomes = await client.closed_loop(jobs, args.concurrency)
    figures = summarize(outcomes, time.perf_counter() - start, args)
    for error in sorted({outcome.error for outcome in outcomes if outcome.error})[:3]:
        print(f"failed: {error}", file=sys.stderr)
    return {"benchmark": "serving", "model": client.model, **figures}


def parse(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--api-key")
    parser.add_argument("--model", help="name in the requests; the server's first when absent")
    parser.add_argument("--num-requests", type=int, default=64)
    loop = parser.add_mutually_exclusive_group()
    loop.add_argument("--concurrency", type=int, default=8, help="clients of a closed loop")
    loop.add_argument("--rate", type=float, help="mean Poisson arrivals per second instead")
    parser.add_argument("--input-len", type=int, nargs=2, default=[32, 256], metavar="N")
    parser.add_argument("--output-len", type=int, nargs=2, default=[16, 128], metavar="N")
    parser.add_argument("--shared-prefix", type=int, default=0, help="tokens all prompts share")
    parser.add_argument("--token-ids", type=int, nargs=2, default=[100, 1000], metavar="N")
    parser.add_argument("--text", action="store_true", help="send words instead of token ids")
    parser.add_argument("--respect-eos", action="store_true", help="do not send ignore_eos")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--slo-ttft-ms", type=float, default=1000.0)
    parser.add_argument("--slo-tpot-ms", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(args)


def main() -> int:
    args = parse()
    figures = asyncio.run(measure(args))
    closed = args.rate is None
    show(
        figures,
        args,
        f"{args.concurrency} clients" if closed else f"Poisson arrivals, {args.rate:g}/s",
    )
    print(json.dumps(figures))
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
