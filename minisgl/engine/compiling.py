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
        self._pending.pop(request_id, None)

    def ready(self, *, wait_for_one: bool) -> Iterator[tuple[Request, Grammar | ValueError]]:
        """Take out those that need wait no longer, each with its grammar or why there is none."""
        if wait_for_one:
            futures = [each.grammar for each in self._pending.values()]
            wait(futures, LOOK_SECONDS, return_when=FIRST_COMPLETED)
        now = time.monotonic()
        for request, future, deadline in list(self._pending.values()):
            if not future.done() and now < deadline:
                continue
            del self._pending[request.id]
            yield request, self._result(future)

    def _result(self, future: Future[Grammar]) -> Grammar | ValueError:
        assert self._backend is not None
        try:
            return future.result(0)
        except TimeoutError:
            most = self._backend.timeout
            return ValueError(f"structured_outputs took longer than {most:g} s to compile")
        except ValueError as error:
            return error
        except Exception as error:  # a bug of the backend: it ends this request alone
            log.error("a grammar could not be compiled", exc_info=error)
            return ValueError(f"structured_outputs: {type(error).__name__}: {error}")
