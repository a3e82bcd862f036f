"""An engine that says what the test tells it to, and an HTTP server around it in a thread."""

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Iterator

from minisgl.core.executor import Limits
from minisgl.core.request import NEUTRAL, Delta, Request, TokenLogprobs
from minisgl.engine.client import EngineDeadError, Health
from minisgl.server.app import Api
from minisgl.server.calls import ServedModel
from minisgl.server.chat_template import ChatTemplate
from minisgl.server.connections import Bounds, HttpServer
from minisgl.server.tokenizer import Tokenizer
from tests.server import small_tokenizers

VOCAB = 400  # the "model's", padded beyond the tokenizer's
CONTEXT = 96
CACHED = 3

CONFIG = {"bos_token": "<s>", "eos_token": "<|im_end|>"}


def served_model(**changes) -> ServedModel:
    template = ChatTemplate(small_tokenizers.CHAT_TEMPLATE)
    tokenizer = Tokenizer(small_tokenizers.byte_level(), CONFIG, template)
    pool = changes.pop("max_pool_tokens", 1024)
    limits = Limits(num_pages=pool, page_size=1, max_rows=8, max_context=CONTEXT, vocab_size=VOCAB)
    defaults = NEUTRAL | {"temperature": 0.6}
    return ServedModel("test-model", tokenizer, limits, sampling_defaults=defaults, **changes)


def logprobs_at(position: int, token_id: int, top: int) -> TokenLogprobs:
    """What the fake engine reports: easy to predict, different at every position."""
    top_ids = [(token_id + i) % VOCAB for i in range(top)]
    return TokenLogprobs(
        token_id, -0.5 - position, top_ids, [-0.5 - position - i for i in range(top)]
    )


def prompt_logprobs(request: Request) -> Iterator[list[TokenLogprobs]]:
    """Those of the prompt, three at a time."""
    if request.params.prompt_logprobs is not None:
        tokens = list(enumerate(request.prompt_token_ids))[1:]
        top = request.params.prompt_logprobs
        for first in range(0, len(tokens), 3):
            yield [logprobs_at(100 + i, t, top) for i, t in tokens[first : first + 3]]


class FakeEngine:
    """Every choice is `text`, one token a delta, then its end of turn; seeds shift nothing."""

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self.reset()

    def reset(self) -> None:
        self.text = "Hello, größer 🚀 world."
        self.delay = 0.0  # seconds before each token
        self.tokens_per_delta = 1
        self.refusal: str | None = None
        self.warnings: list[str] | None = None
        self.dead: str | None = None
        self.fail_after: int | None = None  # tokens of a choice before an error
        self.crash = False
        self.state = Health("ready")
        self.requests: list[Request] = []
        self.aborted: list[tuple[str, int | None]] = []
        self.running: set[str] = set()
        self.profiles: list[tuple[int | None, bool] | None] = []  # started (how), or stopped

    def ids(self, request: Request) -> tuple[list[int], bool]:
        """The tokens of a choice, and whether the last is the end of turn."""
        tokenizer, limit = self.model.tokenizer, request.params.max_tokens
        ids = [*tokenizer.encode(self.text, add_special_tokens=False), tokenizer.eos_token_id]
        if request.params.ignore_eos:
            room = limit or CONTEXT - len(request.prompt_token_ids)
            return (ids[:-1] * room)[:room], False
        return (ids, True) if limit is None or len(ids) <= limit else (ids[:limit], False)

    async def submit(self, request: Request) -> AsyncGenerator[Delta, None]:
        self.requests.append(request)
        if self.refusal:
            raise ValueError(self.refusal)
        if self.dead:
            raise EngineDeadError(self.dead)
        if self.crash:
            raise RuntimeError("secret detail")
        open_choices = set(range(request.params.n))
        ids, ended_by_eos = self.ids(request)
        self.running.add(request.id)
        if self.warnings is not None:
            yield Delta(request.id, 0, [], warnings=self.warnings)
        try:
            for choice in sorted(open_choices):
                for scored in prompt_logprobs(request):
                    yield Delta(request.id, choice, [], prompt_logprobs=scored)
            for start in range(0, len(ids), self.tokens_per_delta):
                run = ids[start : start + self.tokens_per_delta]
                is_last = start + len(run) == len(ids)
                await asyncio.sleep(self.delay)
                for choice in sorted(open_choices):
                    if (request.id, choice) in self.aborted:
                        open_choices.discard(choice)
                        continue
                    if self.fail_after is not None and start >= self.fail_after:
                        yield Delta(request.id, choice, [], "error", error="the device is gone")
                        return
                    yield self._delta(request, choice, start, run, is_last, ended_by_eos)
                    if is_last:
                        open_choices.discard(choice)
                if not open_choices:
                    return
        finally:
            self.running.discard(request.id)
            if open_choices:
                self.aborted.append((request.id, None))

    def _delta(self, request, choice, start, run, is_last, ended_by_eos) -> Delta:
        params = request.params
        scored = None
        if params.logprobs is not None:
            scored = [logprobs_at(start + i, t, params.logprobs) for i, t in enumerate(run)]
        return Delta(
            request.id,
            choice,
            run,
            ("stop" if ended_by_eos else "length") if is_last else None,
            run[-1] if is_last and ended_by_eos else None,
            scored,
            num_cached_tokens=CACHED + 2 * choice,
        )

    def abort(self, request_id: str, choice: int | None = None) -> None:
        self.aborted.append((request_id, choice))

    def _profile(self, what: tuple[int | None, bool] | None) -> None:
        if self.refusal:
            raise ValueError(self.refusal)
        if self.dead:
            raise EngineDeadError(self.dead)
        self.profiles.append(what)

    async def start_profile(self, num_steps: int | None = None, *, traces: bool = True) -> str:
        self._profile((num_steps, traces))
        return "/profiles/1"

    async def stop_profile(self) -> list[str]:
        self._profile(None)
        return ["/profiles/1/timeline.json"]

    def health(self) -> Health:
        return self.state

    def stats(self) -> None:
        return None


class ServerThread:
    """An `Api` around a fake engine, on a port of its own."""

    def __init__(self, bounds: Bounds | None = None, model: ServedModel | None = None) -> None:
        self.model = model or served_model()
        self.engine = FakeEngine(self.model)
        self.api = Api(self.engine)
        self.api.open(self.model)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._server = HttpServer(self.api.app, bounds or Bounds(), "critical")
        run = {"target": self._server.run, "args": ([self._socket],), "daemon": True}
        self._thread = threading.Thread(**run)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()
