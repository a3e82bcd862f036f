"""Requests whose grammars are being compiled: each waits for its own, and nobody waits for it."""

import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import NamedTuple

import msgspec

from minisgl.core.grammar import Grammar, GrammarBackend
from minisgl.core.request import Request
from minisgl.log import get_logger

LOOK_SECONDS = 0.005  # a step waits so long for a compilation while there is nothing else to do

log = get_logger(__name__)


class _Pending(NamedTuple):
    request: Request
    grammar: Future[Grammar]
    deadline: float


class Compiling:
    """They are no sequences yet."""

    def __init__(self, backend: GrammarBackend | None) -> None:
        self._backend = backend
        self._pending: dict[str, _Pending] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._pending

    def add(self, request: Request) -> None:
        """Raises ValueError where there is no backend."""
        spec, backend = request.params.structured_outputs, self._backend
        if backend is None or spec is None:
            raise ValueError("structured_outputs is not supported: this engine has no backend")
        # It is the grammar's from here on, and travels to no device and no other rank.
        params = msgspec.structs.replace(request.params, structured_outputs=None)
        request = msgspec.structs.replace(request, params=params)
        deadline = time.monotonic() + backend.timeout
        self._pending[request.id] = _Pending(request, backend.compile(spec), deadline)

    def drop(self, request_id: str) -> None:
        """What nobody waits for any more is not compiled, unless it has been begun."""
        dropped = self._pending.pop(request_id, None)
        if dropped and all(each.grammar is not dropped.grammar for each in self._pending.values()):
            dropped.grammar.cancel()

    def ready(self, *, wait_for_one: bool) -> Iterator[tuple[Request, list[Grammar] | ValueError]]:
        """Take out those that need wait no longer, each with a grammar for every choice, or with
        why there is none."""
        if wait_for_one:
            futures = [each.grammar for each in self._pending.values()]
            wait(futures, LOOK_SECONDS, return_when=FIRST_COMPLETED)
        now = time.monotonic()
        for request, future, deadline in list(self._pending.values()):
            if not future.done() and now < deadline:
                continue
            grammars = self._grammars(request, future)
            self.drop(request.id)
            yield request, grammars

    def _grammars(self, request: Request, future: Future[Grammar]) -> list[Grammar] | ValueError:
        assert self._backend is not None
        if not future.done():
            most = self._backend.timeout
            return ValueError(f"structured_outputs took longer than {most:g} s to compile")
        try:
            grammar = future.result()
            return [grammar.copy(request.eos_token_id) for _ in range(request.params.n)]
        except ValueError as error:
            return error
        except Exception as error:  # a bug of the backend: it ends this request alone
            log.error("a grammar could not be compiled", exc_info=error)
            return ValueError(f"structured_outputs: {type(error).__name__}: {error}")
