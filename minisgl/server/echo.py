"""A prompt that is repeated before its completion, and where the tokens of such a text begin."""

import codecs
from typing import NamedTuple, Self

from minisgl.server.tokenizer import Tokenizer


class Echo(NamedTuple):
    """The text of a prompt, and where each of its tokens begins, in characters, where asked for."""

    text: str
    offsets: list[int]

    @classmethod
    def of(cls, prompt: str | list[int], ids: list[int], tokenizer: Tokenizer, score: bool) -> Self:
        """Of the prompt as it was given, which is `ids` in tokens."""
        if isinstance(prompt, str):
            return cls(prompt, tokenizer.offsets(prompt, ids) if score else [])
        text = tokenizer.decode(ids)
        cut = int(tokenizer.strips_first_space and text.startswith(" "))
        offsets = Offsets(tokenizer)
        return cls(text[cut:], [max(offsets.advance(i) - cut, 0) for i in ids if score])


class Offsets:
    """Where the tokens of a text begin, in characters, one after another.

    A token that goes on with a character begins where that character does.
    """

    def __init__(self, tokenizer: Tokenizer, echo: Echo | None = None) -> None:
        self._tokenizer = tokenizer
        self._of_prompt = iter(echo.offsets if echo else ())
        self._next = len(echo.text) if echo else 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def advance(self, token_id: int) -> int:
        known = next(self._of_prompt, None)
        if known is not None:
            return known
        is_mark = self._tokenizer.is_special(token_id)
        spelled = b"" if is_mark else self._tokenizer.token_bytes(token_id)
        unfinished, _ = self._decoder.getstate()
        before = (unfinished + spelled[:1]).decode(errors="replace")
        begins = self._next + len(before) - bool(spelled)  # its first byte is of the last character
        self._next += len(self._decoder.decode(spelled))
        return begins
