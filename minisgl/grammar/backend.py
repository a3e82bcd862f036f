"""`core.grammar`'s protocols by llguidance.

Compiling takes up to seconds and happens on threads of its own, without Python's lock but for what
`schema` checks. Ends of text are decided here: llguidance does not count one that it was told of.
"""

import json
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import llguidance as llg
import numpy as np

from minisgl.core.grammar import Grammar, Wanted
from minisgl.grammar.spec import compile_spec, said

COMPILING = 2  # threads
STACK_BYTES = 2**26  # of each: compiling goes deep where schemas lie within schemas
FILLING = 8  # threads that fill a step's masks, at most; half of the cores
FEW = 4  # masks that take less time than waking a thread
# What one sequence's lexer may hold: 1 to 2 kB each. Errors do not repeat what was generated.
LIMITS = llg.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
# Bytes of a compiled grammar, measured generously: of a byte of its text, and besides.
BYTES_PER_BYTE, BYTES_BESIDES = 64, 2**16


class Tokenizer(Protocol):
    """That of the model, with the special tokens that its texts are read with."""

    eos_token_id: int | None

    def to_json(self) -> str: ...


_Read = tuple[llg.LLTokenizer, frozenset[int]]


class LlgGrammar:
    """The state of one sequence."""

    def __init__(self, matcher: llg.LLMatcher, ends: frozenset[int], warnings: list[str]) -> None:
        self.matcher = matcher
        self.warnings = warnings
        self.ends = ends
        self._run: list[int] = []  # forced from here on, as far as it was asked for

    def accept(self, token_id: int) -> str | None:
        if token_id in self.ends:
            return None if self.matcher.is_accepting() else "the text ends before it may"
        if self.matcher.try_consume_tokens([token_id]) == 1:
            self._run = self._run[1:]
            return None
        return said(self.matcher.get_error()) or f"token {token_id} is not allowed"

    def forced(self, most: int) -> list[int]:
        if not self._run:
            self._run = self._look_ahead(most)
        return self._run[:most]

    def _look_ahead(self, most: int) -> list[int]:
        run, matcher = list[int](), self.matcher
        # One by one, as masks are filled: what may still merge with a later token is held back.
        while len(run) < most and (ahead := matcher.compute_ff_tokens()):
            if matcher.try_consume_tokens(ahead[:1]) != 1:
                break  # a limit of the parser, which the token's own step will meet and tell
            run.append(ahead[0])
        only_ends = matcher.is_stopped() and not matcher.is_error()
        if run:
            matcher.rollback(len(run))
        return [*run, *self.ends] if only_ends and len(self.ends) == 1 else run

    def copy(self, end: int | None = None) -> "LlgGrammar":
        ends = self.ends if end is None else self.ends | {end}
        return LlgGrammar(self.matcher.deep_copy(), ends, self.warnings)

    def before_end(self, drafts: list[int]) -> list[int]:
        """Drafts up to an end of text, behind which all is discarded."""
        at = next((i for i, draft in enumerate(drafts) if draft in self.ends), None)
        return drafts if at is None else drafts[:at]


class LlgBackend:
    """Compiles for one model. `close` it, or its threads stay."""

    def __init__(
        self,
        read_tokenizer: Callable[[], Tokenizer],
        vocab_size: int,
        ends: Collection[int],
        *,
        timeout: float = 10.0,
        max_bytes: int = 2**17,
        cache_bytes: int = 2**28,
    ) -> None:
        """read_tokenizer: called on a thread; ends: tokens that end a text, besides its own;
        timeout: seconds, for those who wait; max_bytes: of a specification; cache_bytes: of all
        compiled grammars that are kept."""
        self.timeout = timeout
        self._max_bytes, self._cache_bytes = max_bytes, cache_bytes
        self._ends = frozenset(ends)
        self._kept: OrderedDict[str, tuple[Future[Grammar], int]] = OrderedDict()
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(COMPILING, "grammar", initializer=_give_way)
        before = threading.stack_size(STACK_BYTES)
        self._tokenizer = self._threads.submit(self._read, read_tokenizer, vocab_size)
        for _ in range(1, COMPILING):  # a thread for each
            self._threads.submit(self._tokenizer.exception)
        threading.stack_size(before)
        threads = min(FILLING, max(1, (os.cpu_count() or 1) // 2))
        self._filling = llg.LLExecutor(threads)
        self._few = FEW if threads > 1 else 2**31  # masks that are not worth another thread

    def compile(self, spec: str) -> Future[Grammar]:
        """Each content is compiled once, and shared: its state is copied for a sequence."""
        with self._lock:
            if spec in self._kept:
                self._kept.move_to_end(spec)
                return self._kept[spec][0]
            future = self._threads.submit(self._compile, spec)
            self._kept[spec] = future, BYTES_PER_BYTE * len(spec) + BYTES_BESIDES
            total = sum(size for _, size in self._kept.values())
            while total > self._cache_bytes and len(self._kept) > 1:
                total -= self._kept.popitem(last=False)[1][1]
        future.add_done_callback(lambda done: self._forget(spec, done))
        return future

    def fill_masks(self, wanted: Sequence[Wanted], bits: np.ndarray) -> dict[int, str]:
        """As of the protocol, by llguidance's own threads."""
        plain: list[tuple[llg.LLMatcher, int]] = []
        drafting: list[tuple[llg.LLMatcher, int, list[int]]] = []
        matchers = []
        for grammar, first, drafts in wanted:
            assert isinstance(grammar, LlgGrammar)
            matchers.append(grammar.matcher)
            if drafts and (before := grammar.before_end(drafts)):
                drafting.append((grammar.matcher, first, before))
            else:
                plain.append((grammar.matcher, first))
        at, (rows, words) = bits.ctypes.data, bits.shape
        if len(plain) <= self._few:
            for matcher, row in plain:
                matcher.unsafe_compute_mask_ptr(at + 4 * words * row, 4 * words)
        else:
            self._filling.unsafe_compute_mask_ptr(plain, at, 4 * words, rows)
        if drafting:
            fill = self._filling.unsafe_compute_mask_ptr_with_draft_token
            fill(drafting, at, 4 * words, rows)
        return {i: said(m.get_error()) for i, m in enumerate(matchers) if m.is_error()}

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _read(self, read_tokenizer: Callable[[], Tokenizer], vocab_size: int) -> _Read:
        """The tokenizer, and all tokens that end a text."""
        known = read_tokenizer()
        named = set() if known.eos_token_id is None else {known.eos_token_id}
        ends = frozenset(i for i in self._ends | named if i < vocab_size)
        if not ends:
            raise ValueError("structured_outputs needs a model that names its end-of-text tokens")
        spelled = json.loads(known.to_json())  # configs may name tokens that the model has not
        spelled["added_tokens"] = [t for t in spelled["added_tokens"] if t["id"] < vocab_size]
        text = json.dumps(spelled)
        return llg.LLTokenizer(text, n_vocab=vocab_size, eos_token=sorted(ends)), ends

    def _compile(self, spec: str) -> Grammar:
        if (size := len(spec.encode())) > self._max_bytes:
            raise ValueError(
                f"structured_outputs must have at most {self._max_bytes} bytes as JSON "
                f"(--grammar-max-bytes), got {size}"
            )
        tokenizer, ends = self._tokenizer.result()

        def make(grammar: str) -> llg.LLMatcher:
            return llg.LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)

        matcher, warnings = compile_spec(spec, make)
        return LlgGrammar(matcher, ends, warnings)

    def _forget(self, spec: str, done: Future[Grammar]) -> None:
        """What could not be compiled is not kept: it may have waited too long."""
        with self._lock:
            if done.cancelled() or done.exception() is not None:
                self._kept.pop(spec, None)


def _give_way() -> None:
    """Have the calling thread compute when others do not, on Linux, where it can be asked."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
