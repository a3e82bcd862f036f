"""Tokens of one choice -> its text as they arrive: whole characters, cut at stop strings."""

import codecs
from collections.abc import Container, Sequence
from typing import NamedTuple

from minisgl.core.request import Delta, FinishReason, SamplingParams, TokenLogprobs
from minisgl.server.tokenizer import Tokenizer


class Piece(NamedTuple):
    """What one `Delta` added to a choice. `token_ids` include the token that ended it."""

    text: str
    texts: list[str]  # the same, by token
    token_ids: list[int]
    logprobs: list[TokenLogprobs]
    finish_reason: FinishReason | None


class StopMatcher:
    """Finds the stop string that completes first, in a text that comes in pieces.

    Text that may be the beginning of a stop string is held back. What comes out depends on the
    whole text only, never on where it was split: of the stop strings that end earliest the longest
    wins, and the text ends where it begins.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that is safe to show now. Sets `matched` when a stop string is complete."""
        if not self._stops or self.matched is not None:
            return "" if self.matched is not None else text
        text = self._held + text
        ends = [(text.find(stop) + len(stop), -len(stop)) for stop in self._stops if stop in text]
        if ends:
            end, minus_length = min(ends)
            start = end + minus_length
            self.matched, self._held = text[start:end], ""
            return text[:start]
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is held back, when nothing more will come."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class TextStream:
    """The text of one choice, fed with its deltas. Joined pieces equal the text of one big delta.

    A character whose bytes are spread over tokens appears when it is complete. Special tokens,
    but for those that are `shown`, and the token that ended the choice give no text. Stop strings
    count from `min_tokens` on.
    """

    def __init__(
        self, tokenizer: Tokenizer, params: SamplingParams, shown: Container[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._shown = shown
        self._min_tokens = params.min_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._matcher = StopMatcher(params.stop)
        self.num_tokens = 0
        self.finish_reason: FinishReason | None = None

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the text; its request can be aborted then."""
        return self._matcher.matched

    def feed(self, delta: Delta) -> Piece:
        """The delta as text. Once the choice has ended, later deltas give empty pieces."""
        if self.finish_reason is not None:
            return Piece("", [], [], [], None)
        texts: list[str] = []
        taken = 0
        for taken, token_id in enumerate(delta.token_ids, start=1):
            texts.append(self._push(token_id, is_last=taken == len(delta.token_ids), delta=delta))
            if self.stop_string is not None:
                break
        if self.stop_string is not None:
            self.finish_reason = "stop"
        elif delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            texts[-1:] = ["".join((*texts[-1:], self._end()))]
        logprobs = (delta.logprobs or [])[:taken]
        token_ids = delta.token_ids[:taken]
        return Piece("".join(texts), texts, token_ids, logprobs, self.finish_reason)

    def _push(self, token_id: int, *, is_last: bool, delta: Delta) -> str:
        self.num_tokens += 1
        ended_by = delta.stop_token_id if is_last else None
        is_mark = self._tokenizer.is_special(token_id) and token_id not in self._shown
        if token_id == ended_by or is_mark:
            return ""
        return self._match(self._decoder.decode(self._tokenizer.token_bytes(token_id)))

    def _match(self, text: str) -> str:
        if self.num_tokens <= self._min_tokens:
            return text
        return self._matcher.push(text)

    def _end(self) -> str:
        rest = self._match(self._decoder.decode(b"", final=True))
        if self.stop_string is not None:
            self.finish_reason = "stop"
            return rest
        return rest + self._matcher.flush()
