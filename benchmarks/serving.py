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
import math
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

WORDS = (
    *("time", "page", "token", "batch", "cache", "prompt", "step"),
    *("queue", "model", "stream", "tree", "copy", "plan", "order"),
)


@dataclass
class Job:
    prompt: str | list[int]
    max_tokens: int
    at: float = 0.0  # seconds after the start; not before


@dataclass
class Outcome:
    """What one client saw. Seconds are counted from when its request was due."""

    start: float
    chunks: list[float] = field(default_factory=list)  # when each chunk with text came
    prompt_tokens: int = 0
    output_tokens: int = 0
    end: float = 0.0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.chunks[0] - self.start

    @property
    def latency(self) -> float:
        return self.end - self.start

    @property
    def tpot(self) -> float:
        """Seconds per output token after the first."""
        return (self.chunks[-1] - self.chunks[0]) / max(self.output_tokens - 1, 1)

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.chunks, self.chunks[1:], strict=False)]


# ---- a small HTTP client: cheaper than the general ones, whose cost would be measured, too -------


@asynccontextmanager
async def http(
    url: SplitResult, method: str, path: str, body: object = None, key: str | None = None
) -> AsyncIterator[tuple[int, AsyncIterator[bytes]]]:
    """One request on a connection of its own: the status, and the body in pieces as they come."""
    secure = url.scheme == "https"
    port = url.port or (443 if secure else 80)
    reader, writer = await asyncio.open_connection(url.hostname, port, ssl=secure or None)
    try:
        content = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {url.path.rstrip('/')}{path} HTTP/1.1", f"Host: {url.netloc}"]
        head += [f"Content-Length: {len(content)}", "Connection: close"]
        head += ["Content-Type: application/json"] if content else []
        head += [f"Authorization: Bearer {key}"] if key else []
        writer.write("\r\n".join([*head, "", ""]).encode() + content)
        status = int((await reader.readline()).split()[1])
        headers = {}
        while line := (await reader.readline()).strip().decode():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        yield status, _pieces(reader, headers.get("transfer-encoding") == "chunked")
    finally:
        writer.close()


async def _pieces(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[bytes]:
    if not chunked:
        while piece := await reader.read(65536):
            yield piece
        return
    while size := int(await reader.readline(), 16):
        yield await reader.readexactly(size)
        await reader.readline()


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line
    if rest:
        yield rest


# ---- the load ------------------------------------------------------------------------------------


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


class Load:
    """Sends jobs to one server."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._url = urlsplit(args.url.rstrip("/").removesuffix("/v1") + "/v1")
        self._args = args
        self.model: str = args.model or ""

    async def find_model(self) -> None:
        """Ask the server what it serves, unless it was said."""
        if not self.model:
            async with http(self._url, "GET", "/models", key=self._args.api_key) as (status, body):
                content = b"".join([piece async for piece in body])
                if status != 200:
                    raise SystemExit(f"{self._url.netloc} answers {status}: {content.decode()}")
                self.model = json.loads(content)["data"][0]["id"]

    async def send(self, job: Job, start: float) -> Outcome:
        """One request, streamed to its end."""
        outcome = Outcome(start)
        body = {
            "model": self.model,
            "prompt": job.prompt,
            "max_tokens": job.max_tokens,
            "temperature": self._args.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if not self._args.respect_eos:
            body["ignore_eos"] = True
        try:
            async with http(self._url, "POST", "/completions", body, self._args.api_key) as answer:
                await self._read(*answer, outcome)
        except (OSError, ValueError, LookupError, asyncio.IncompleteReadError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.end = time.perf_counter()
        if outcome.error is None:
            outcome.error = self._fault(job, outcome)
        return outcome

    async def _read(self, status: int, pieces: AsyncIterator[bytes], outcome: Outcome) -> None:
        if status != 200:
            said = b"".join([piece async for piece in pieces]).decode(errors="replace")
            outcome.error = f"{status}: {said[:200]}"
            return
        async for line in _lines(pieces):
            data = line.strip().removeprefix(b"data: ")
            if not data or data == b"[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                outcome.error = str(chunk["error"])
            elif chunk["choices"]:
                outcome.chunks.append(time.perf_counter())
            if usage := chunk.get("usage"):
                outcome.prompt_tokens = usage["prompt_tokens"]
                outcome.output_tokens = usage["completion_tokens"]

    def _fault(self, job: Job, outcome: Outcome) -> str | None:
        """Whether what came is not what was asked for: then its speed means nothing."""
        if not outcome.chunks or not outcome.output_tokens:
            return "the stream had no text or no usage"
        if not self._args.respect_eos and outcome.output_tokens != job.max_tokens:
            return f"{outcome.output_tokens} tokens came, {job.max_tokens} were asked for"
        return None

    async def closed_loop(self, jobs: Sequence[Job], clients: int) -> list[Outcome]:
        waiting, outcomes = iter(jobs), []

        async def client() -> None:
            for job in waiting:
                outcomes.append(await self.send(job, time.perf_counter()))

        await asyncio.gather(*(client() for _ in range(clients)))
        return outcomes

    async def open_loop(self, jobs: Sequence[Job]) -> list[Outcome]:
        start = time.perf_counter()

        async def client(job: Job) -> Outcome:
            await asyncio.sleep(start + job.at - time.perf_counter())
            return await self.send(job, start + job.at)

        return await asyncio.gather(*(client(job) for job in jobs))


# ---- figures -------------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


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


async def measure(args: argparse.Namespace) -> dict[str, Any]:
    load, jobs = Load(args), make_jobs(args)
    await load.find_model()
    warm = await load.send(Job(jobs[0].prompt, jobs[0].max_tokens), time.perf_counter())
    if warm.error is not None:
        raise SystemExit(f"the warm-up request failed: {warm.error}")
    start = time.perf_counter()
    if args.rate is not None:
        outcomes = await load.open_loop(jobs)
    else:
        outcomes = await load.closed_loop(jobs, args.concurrency)
    figures = summarize(outcomes, time.perf_counter() - start, args)
    for error in sorted({outcome.error for outcome in outcomes if outcome.error})[:3]:
        print(f"failed: {error}", file=sys.stderr)
    return {"benchmark": "serving", "model": load.model, **figures}


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
