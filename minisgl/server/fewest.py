"""How few tokens a text can have: what is surely too long need not be encoded.

That follows from the tokenizer's own description; where it does not, nothing is said.
"""

import json
import math
import unicodedata
from collections.abc import Callable

import numpy as np
import tokenizers
from tokenizers.models import BPE

WINDOW = 2**16  # characters looked at before other threads may run
# Normalizers that are understood. NFC changes no text that is in this form already.
_NFC, _PREPEND = {"type": "NFC"}, {"type": "Prepend", "prepend": "▁"}
_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


class FewestTokens:
    """Of the texts of one tokenizer. `spell` says which bytes a token is."""

    def __init__(self, backend: tokenizers.Tokenizer, spell: Callable[[int], bytes]) -> None:
        model, vocabulary, splitter = backend.model, backend.get_vocab(), backend.pre_tokenizer
        described = json.loads(backend.normalizer.__getstate__()) if backend.normalizer else {}
        steps = described.get("normalizers", [described])
        byte_level = splitter is not None and b'"ByteLevel"' in splitter.__getstate__()
        fallback = {f"<0x{byte:02X}>" for byte in range(256)} <= vocabulary.keys()
        known = (
            type(model) is BPE
            # Where a character may be unknown, a run of any length may be one token.
            and (model.byte_fallback if fallback else byte_level and not model.unk_token)
            and all(step in (_NFC, _PREPEND, _MARK, {}) for step in steps)
            # Some tokens take all spaces beside them.
            and not any(t.lstrip or t.rstrip for t in backend.get_added_tokens_decoder().values())
        )
        texts = sorted(map(spell, vocabulary.values()), key=len)
        lengths = list(map(len, texts))
        longest = np.full(256, np.inf)  # token that holds a byte
        longest[np.frombuffer(b"".join(texts), np.uint8)] = np.repeat(lengths, lengths)
        self._shares = known / longest
        self._composes = _NFC in steps

    def of(self, text: str) -> int:
        """A number of tokens that the text has at least; 0 where nothing is known.

        Of a token of L bytes each byte is 1/L, so a byte is at least 1/M of a token, M being the
        length of the longest token that holds this byte.
        """
        if self._composes and not unicodedata.is_normalized("NFC", text):
            return 0
        found = 0.0
        for start in range(0, len(text), WINDOW):
            spelled = text[start : start + WINDOW].replace("▁", " ").encode(errors="replace")
            counts = np.bincount(np.frombuffer(spelled, np.uint8), minlength=256)
            found += float(counts @ self._shares)
        return math.floor(found)
