"""A client of OpenAI-like servers: sends streamed completions, and notes when each chunk came.

It is smaller than the general HTTP clients, whose cost would be measured, too.
"""

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit


@dataclass
class Job:
    prompt: str | list[int]
    max_tokens: int
    at: float = 0.0  # seconds after the start; not before


@dataclass
class Outcome:
    """What one client saw. Seconds are counted from when its request was due."""

    start: float
    chunks: list[float] = field(default_factory=list)  # when each chunk with a token came
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


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share) - 1)]


class Client:
    """Sends jobs to the server at `url`, with or without /v1 at its end."""

    def __init__(
        self,
        url: str,
        *,
        model: str = "",
        api_key: str | None = None,
        temperature: float = 0.0,
        ignore_eos: bool = True,
    ) -> None:
        self._url = urlsplit(url.rstrip("/").removesuffix("/v1") + "/v1")
        self._key = api_key
        self._asked: dict[str, object] = {"temperature": temperature, "stream": True}
        self._asked |= {"stream_options": {"include_usage": True}}
        self._asked |= {"ignore_eos": True} if ignore_eos else {}
        self._ignore_eos = ignore_eos
        self.model = model

    async def find_model(self) -> None:
        """Ask the server what it serves, unless it was said. Raises OSError while it does not."""
        if not self.model:
            async with _http(self._url, "GET", "/models", key=self._key) as (status, body):
                content = b"".join([piece async for piece in body])
                if status != 200:
                    said = content.decode(errors="replace")[:200]
                    raise OSError(f"{self._url.netloc} answers {status}: {said}")
                self.model = json.loads(content)["data"][0]["id"]

    async def send(self, job: Job, start: float) -> Outcome:
        """One request, streamed to its end."""
        outcome = Outcome(start)
        body = {"model": self.model, "prompt": job.prompt, "max_tokens": job.max_tokens}
        try:
            async with _http(
                self._url, "POST", "/completions", body | self._asked, self._key
            ) as answer:
                await _read(*answer, outcome)
        except (OSError, ValueError, LookupError, asyncio.IncompleteReadError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
        outcome.end = time.perf_counter()
        if outcome.error is None:
            outcome.error = self._fault(job, outcome)
        return outcome

    def _fault(self, job: Job, outcome: Outcome) -> str | None:
        """Whether what came is not what was asked for: then its speed means nothing."""
        if not outcome.chunks or not outcome.output_tokens:
            return "the stream had no text or no usage"
        if self._ignore_eos and outcome.output_tokens != job.max_tokens:
            return f"{outcome.output_tokens} tokens came, {job.max_tokens} were asked for"
        return None

    async def closed_loop(self, jobs: Sequence[Job], clients: int) -> list[Outcome]:
        """So many clients at a time, each of which sends a job when its last one has ended."""
        waiting, outcomes = iter(jobs), []

        async def client() -> None:
            for job in waiting:
                outcomes.append(await self.send(job, time.perf_counter()))

        await asyncio.gather(*(client() for _ in range(clients)))
        return outcomes

    async def open_loop(self, jobs: Sequence[Job]) -> list[Outcome]:
        """Every job when it is due."""
        start = time.perf_counter()

        async def client(job: Job) -> Outcome:
            await asyncio.sleep(start + job.at - time.perf_counter())
            return await self.send(job, start + job.at)

        return await asyncio.gather(*(client(job) for job in jobs))


async def _read(status: int, pieces: AsyncIterator[bytes], outcome: Outcome) -> None:
    if status != 200:
        said = b"".join([piece async for piece in pieces]).decode(errors="replace")
        outcome.error = f"{status}: {said[:200]}"
        return
    closing = None
    async for line in _lines(pieces):
        data = line.strip().removeprefix(b"data: ")
        if not data or data == b"[DONE]":
            continue
        chunk, now = json.loads(data), time.perf_counter()
        if "error" in chunk:
            outcome.error = str(chunk["error"])
        elif choices := chunk.get("choices"):
            if choices[0].get("text") or choices[0].get("finish_reason") is None:
                outcome.chunks.append(now)
            else:
                closing = now
        if usage := chunk.get("usage"):
            outcome.prompt_tokens = usage["prompt_tokens"]
            outcome.output_tokens = usage["completion_tokens"]
    if not outcome.chunks and closing is not None:
        outcome.chunks.append(closing)  # a single token without text of its own


@asynccontextmanager
async def _http(
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
