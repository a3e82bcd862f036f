"""A grammar is three verbs: accept a token, fill a mask, roll back."""

from typing import Protocol

import numpy as np


class Grammar(Protocol):
    """The state of one constrained sequence."""

    def accept(self, token_id: int) -> bool:
        """Advance by one token; False (and no change) when the grammar does not allow it."""

    def fill_mask(self, bits: np.ndarray) -> None:
        """Write the allowed next tokens into `bits`, uint32 [ceil(vocab / 32)], set = allowed."""

    def roll_back(self, count: int) -> None:
        """Undo the last `count` accepted tokens."""


class GrammarBackend(Protocol):
    """Compiles grammar specifications."""

    def compile(self, spec: str) -> Grammar:
        """Raises ValueError when `spec` is not a valid grammar."""
