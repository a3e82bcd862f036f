"""A small regular-expression grammar: letters, "|", "*" and brackets; a token is a letter.

Thompson's construction (1968): the state is the set of places in the expression that a text may
have reached.
"""

import numpy as np

from tests.world.grammars import PlainBackend, PlainGrammar

FIRST_LETTER = 2  # the token id of "a"


class Regex:
    """The compiled expression: edges on letters, and edges that cost nothing."""

    def __init__(self, expression: str) -> None:
        self.letters: list[tuple[int, int, int]] = []  # from, token id, to
        self.free: list[tuple[int, int]] = []
        self.size = 0
        self._left = expression
        self.start, self.end = self._either()
        if self._left:
            raise ValueError(f"unexpected {self._left!r} in {expression!r}")

    def _place(self) -> int:
        self.size += 1
        return self.size - 1

    def _either(self) -> tuple[int, int]:
        start, end = self._sequence()
        while self._left.startswith("|"):
            self._left = self._left[1:]
            other = self._sequence()
            begin, after = self._place(), self._place()
            self.free += [(begin, start), (begin, other[0]), (end, after), (other[1], after)]
            start, end = begin, after
        return start, end

    def _sequence(self) -> tuple[int, int]:
        start = end = self._place()
        while self._left and self._left[0] not in "|)":
            first, last = self._repeated()
            self.free.append((end, first))
            end = last
        return start, end

    def _repeated(self) -> tuple[int, int]:
        letter, self._left = self._left[0], self._left[1:]
        if letter == "(":
            start, end = self._either()
            self._left = self._left.removeprefix(")")
        else:
            start, end = self._place(), self._place()
            self.letters.append((start, FIRST_LETTER + ord(letter) - ord("a"), end))
        if self._left.startswith("*"):
            self._left = self._left[1:]
            self.free += [(start, end), (end, start)]
        return start, end

    def closure(self, places: set[int]) -> frozenset[int]:
        """All places reached from these without a letter."""
        while more := {b for a, b in self.free if a in places} - places:
            places = places | more
        return frozenset(places)

    def step(self, places: frozenset[int], token_id: int) -> frozenset[int]:
        return self.closure({b for a, t, b in self.letters if a in places and t == token_id})


class RegexGrammar(PlainGrammar):
    """Implements `core.grammar.Grammar`; the end-of-sequence token ends a complete text."""

    def __init__(self, regex: Regex, eos: int) -> None:
        self._regex, self._eos = regex, eos
        self._state = regex.closure({regex.start})

    def accept(self, token_id: int) -> str | None:
        reached = self._regex.step(self._state, token_id)
        if token_id == self._eos and self._regex.end in self._state:
            reached = frozenset({-1})
        if not reached:
            return f"{token_id} is not allowed"
        self._state = reached
        return None

    def fill_mask(self, bits: np.ndarray) -> None:
        state = self._state
        allowed = {t for a, t, _ in self._regex.letters if a in state}
        if self._regex.end in state or not allowed:
            allowed.add(self._eos)
        for token_id in allowed:
            bits[token_id // 32] |= np.uint32(1 << token_id % 32)


class RegexBackend(PlainBackend):
    """Implements `core.grammar.GrammarBackend`."""

    def __init__(self, eos: int) -> None:
        self._eos = eos

    def begin(self, text: str) -> RegexGrammar:
        return RegexGrammar(Regex(text), self._eos)


def spell(token_ids: list[int], eos: int) -> str:
    """The text of tokens, without the end."""
    return "".join(chr(ord("a") + t - FIRST_LETTER) for t in token_ids if t != eos)
