"""What the grammar backends of tests share: masks are filled by one grammar after another."""

import copy
import json
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from minisgl.core.grammar import Grammar, Wanted


class PlainGrammar:
    """A `core.grammar.Grammar` but for `accept` and `fill_mask`; its state is copied deeply."""

    warnings: Sequence[str] = ()

    def copy(self, end: int | None = None) -> Any:
        return copy.deepcopy(self)

    def forced(self, most: int) -> list[int]:
        state, run = self.copy(), list[int]()
        while len(run) < most:
            bits = np.zeros(64, np.uint32)
            failed = state.fill_mask(bits)
            allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
            if failed is not None or len(allowed) != 1:
                break
            run.append(int(allowed[0]))
            state.accept(run[-1])
        return run

    def fill_mask(self, bits: np.ndarray) -> str | None:
        """Set the allowed tokens in `bits`, which are all 0; why it cannot, or None."""
        raise NotImplementedError


class PlainBackend:
    """A `core.grammar.GrammarBackend` but for `begin`, which compiles at once."""

    timeout = 10.0
    closed = False

    def begin(self, text: str) -> PlainGrammar:
        raise NotImplementedError

    def compile(self, spec: str) -> Future[Grammar]:
        future: Future[Grammar] = Future()
        try:
            (text,) = json.loads(spec).values()
            future.set_result(self.begin(text))
        except Exception as error:
            future.set_exception(error)
        return future

    def fill_masks(self, wanted: Sequence[Wanted], bits: np.ndarray) -> dict[int, str]:
        failed = {}
        for index, (grammar, first, drafts) in enumerate(wanted):
            state = grammar.copy()
            for row, draft in enumerate([*drafts, None], first):
                bits[row] = 0
                if (reason := state.fill_mask(bits[row])) is not None:
                    failed[index] = reason
                if draft is None or state.accept(draft) is not None:
                    break
        return failed

    def close(self) -> None:
        self.closed = True
