"""Drafts without a second model: what followed the last few tokens where they stood before.

Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023): the longest run of tokens that ends the
text and occurs earlier in it, the latest occurrence first, is taken to go on as it did there.
Where no run of the text occurs earlier, the radix tree is asked: it holds the answer of a prompt
that was asked before.
"""

from collections.abc import Callable
from weakref import WeakKeyDictionary

from minisgl.core.sequence import Sequence

# The cached tokens that follow a sequence's tokens and these guesses, at most so many of them.
Continuation = Callable[[Sequence, list[int], int], list[int]]

MAX_ASK_INTERVAL = 64  # tokens until a tree without a continuation is asked again, at most


class _Text:
    """One sequence's tokens, indexed, and what was predicted when it was last planned."""

    __slots__ = (
        "after",
        "ask_interval",
        "asks_at",
        "drafts",
        "lead",
        "num_known",
        "num_output",
        "tokens",
    )

    def __init__(self, prompt: list[int], sizes: range) -> None:
        self.tokens = list(prompt)
        self.num_output = 0
        # By size: a run of tokens -> the position after its latest occurrence, which holds one.
        self.after: dict[int, dict[tuple[int, ...], int]] = {}
        for size in sizes:
            last = max(len(prompt) - size, 0)
            runs = zip(*(prompt[i : last + i] for i in range(size)), strict=True)
            self.after[size] = dict(zip(runs, range(size, size + last), strict=True))
        self.num_known = 0  # tokens then; predicted were `lead`, which is pending, then `drafts`
        self.lead: list[int] = []
        self.drafts: list[int] = []
        self.asks_at = 0  # tokens from which on the tree is asked
        self.ask_interval = 1

    def extend(self, output: list[int]) -> None:
        """Take in the tokens of `output` that are new."""
        tokens = self.tokens
        for token in output[self.num_output :]:
            end = len(tokens)
            for size, after in self.after.items():
                if end >= size:
                    after[tuple(tokens[end - size :])] = end
            tokens.append(token)
        self.num_output = len(output)

    def in_flight(self) -> list[int]:
        """The drafts being verified, if the tokens before them were predicted right; else []."""
        known, lead = self.num_known, self.lead
        if self.tokens[known:] != lead:
            return []
        return self.drafts

    def predict(self, path: list[int], count: int) -> list[int]:
        """The `count` tokens after the text and `path`; [] where its last tokens are new."""
        tokens = self.tokens
        known = len(tokens)
        tokens += path  # then what is predicted, so that a period is repeated as often as needed
        for size in sorted(self.after, reverse=True):
            position = self.after[size].get(tuple(tokens[-size:]))
            if position is not None:
                start = len(tokens)
                for index in range(position, position + count):
                    tokens.append(tokens[index])
                found = tokens[start:]
                break
        else:
            found = []
        del tokens[known:]
        return found


class NGramProposer:
    """Proposes by the runs of `min_match` to `max_match` tokens of a sequence.

    While a step is unread, its drafts and one token after them are predicted too, and the proposal
    starts there. A wrong prediction only makes acceptance less likely.
    """

    def __init__(self, min_match: int, max_match: int) -> None:
        """ValueError: matches that are not at least 1 and in order."""
        if not 1 <= min_match <= max_match:
            raise ValueError(
                f"the smallest match must be at least 1 and at most the largest ({max_match}), "
                f"got {min_match}"
            )
        self._sizes = range(min_match, max_match + 1)
        self._texts: WeakKeyDictionary[Sequence, _Text] = WeakKeyDictionary()
        self.continuation: Continuation | None = None  # set where there is a radix tree

    def __call__(self, sequence: Sequence, count: int) -> list[int]:
        text = self._texts.get(sequence)
        if text is None:
            text = _Text(sequence.request.prompt_token_ids, self._sizes)
            self._texts[sequence] = text
        text.extend(sequence.output)
        pending = sequence.num_pending
        path = text.in_flight() if pending else []
        found = text.predict(path, pending + count)
        known = len(text.tokens)
        if not found and self.continuation is not None and known >= text.asks_at:
            found = self.continuation(sequence, path, pending + count)
            # Asking takes time in proportion to the text, and evicted runs seldom come back.
            text.ask_interval = 1 if found else min(2 * text.ask_interval, MAX_ASK_INTERVAL)
            text.asks_at = known if found else known + text.ask_interval
        text.num_known = known
        text.lead, text.drafts = path + found[:pending], found[pending:]
        return text.drafts
