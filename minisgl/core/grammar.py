"""A grammar says which tokens may come next. A backend compiles it, and fills the masks of a step.

Nothing here raises once a grammar is compiled: what fails ends one sequence, with the reason given.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol, Self

import numpy as np

MOST_FORCED = 64  # tokens appended at once: looking for more would delay the others


class Grammar(Protocol):
    """The state of one constrained sequence."""

    @property
    def warnings(self) -> list[str]:
        """What of its specification is not kept, and why, where that was allowed."""

    def accept(self, token_id: int) -> str | None:
        """Advance by one token, an end of text included; why it cannot, or None: it has."""

    def forced(self, most: int) -> list[int]:
        """The tokens, `most` at most, that masks would allow alone, one after another."""

    def copy(self, end: int | None = None) -> Self:
        """The same state, for another sequence, whose text `end` ends too."""


class Forced(NamedTuple):
    """What must come next of a sequence."""

    token_ids: list[int]
    drafts: list[int]  # of the step in flight, if there is one


class Wanted(NamedTuple):
    """Masks of one sequence: what may come next, and what may come after each of its drafts."""

    grammar: Grammar
    first: int  # row of the first mask; the others are in the rows after it
    drafts: list[int]


class GrammarBackend(Protocol):
    """Compiles specifications, on threads of its own."""

    @property
    def timeout(self) -> float:
        """Seconds that a request waits for its grammar, at most."""

    def compile(self, spec: str) -> Future[Grammar]:
        """`spec` is `SamplingParams.structured_outputs`. Returns at once; a ValueError of the
        future says what of it cannot be kept."""

    def fill_masks(self, wanted: Sequence[Wanted], bits: np.ndarray) -> dict[int, str]:
        """Write allowed tokens into `bits`, uint32 [rows, ceil(vocab / 32)], set = allowed.

        Rows come with every bit set, and what follows a draft that is not allowed may stay so: it
        is discarded. Returns why masks could not be computed, by index in `wanted`.
        """

    def close(self) -> None:
        """End its threads. Idempotent."""
