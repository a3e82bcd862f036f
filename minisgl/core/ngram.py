"""Drafts without a second model: what followed the last few tokens where they stood before.

Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023): the longest run of tokens that ends the
text and occurs earlier in it, the latest occurrence first, is taken to go on as it did there.
Where no run of the text occurs earlier, the radix tree is asked: it holds the answer of a prompt
that was asked before.

Indexing a prompt of 100k tokens takes 0.1 s, for which nobody should wait. It begins when the
prompt is first computed and goes on from its end to its beginning, about PLAN_TOKENS in each plan.
Until it is done, early occurrences are not found, which only costs acceptance. An answer that
grew while nothing was proposed is caught up with likewise, before anything is proposed again.
"""

from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from minisgl.core.sequence import Sequence

# The cached tokens that follow a sequence's tokens and these guesses, at most so many of them.
Continuation = Callable[[Sequence, list[int], int], list[int]]

MAX_ASK_INTERVAL = 64  # tokens until a tree without a continuation is asked again, at most
PIECE = 512  # tokens indexed in one dictionary: rehashing a large one takes long
PLAN_TOKENS = 768  # indexed in a plan, and up to a piece more
STEP_TOKENS = 32  # of an answer, indexed beyond that: more than come between two proposals
COPIED = 256  # tokens that are copied or compared in the time in which one is indexed


@dataclass(slots=True)
class _Text:
    """One sequence's tokens, indexed, and what was predicted when it was last planned."""

    tokens: "array[int]"
    sizes: range
    num_unindexed: int  # first tokens that no piece has yet
    num_output: int = 0
    # Pieces of the text, the latest first: a run of tokens -> the position after its latest
    # occurrence in the piece, which holds a token of that piece. Runs are bytes: the garbage
    # collector need not look at them, as it would at tuples.
    pieces: deque[dict[bytes, int]] = field(default_factory=lambda: deque([{}]))
    num_known: int = 0  # tokens then; predicted were `lead`, which is pending, then `drafts`
    lead: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    asks_at: int = 0  # tokens from which on the tree is asked
    ask_interval: int = 1

    def index(self) -> int:
        """Index the prompt's last piece of which nothing is indexed; returns its tokens."""
        stop = self.num_unindexed
        start = self.num_unindexed = max(stop - PIECE, 0)
        begin = max(start - self.sizes[-1], 0)
        data, width = self.tokens[begin:stop].tobytes(), self.tokens.itemsize
        piece: dict[bytes, int] = {}
        for size in self.sizes:
            for position in range(max(start, size), stop):
                end = (position - begin) * width
                piece[data[end - size * width : end]] = position
        self.pieces.append(piece)
        return stop - start

    def extend(self, output: list[int], most: int) -> int:
        """Take in the next tokens of `output`, `most` of them; returns how many."""
        tokens, new = self.tokens, output[self.num_output : self.num_output + most]
        for token in new:
            end = len(tokens)
            for size in self.sizes:
                if end >= size:
                    self.pieces[0][tokens[end - size :].tobytes()] = end
            tokens.append(token)
            if len(self.pieces[0]) >= PIECE * len(self.sizes):
                self.pieces.appendleft({})
        self.num_output += len(new)
        return len(new)

    def in_flight(self) -> list[int]:
        """The drafts being verified, if the tokens before them were predicted right; else []."""
        known, lead = self.num_known, self.lead
        right = len(self.tokens) - known == len(lead) and self.tokens[known:].tolist() == lead
        return self.drafts if right else []

    def predict(self, path: list[int], count: int) -> list[int]:
        """The `count` tokens after the text and `path`; [] where its last tokens are new."""
        tokens = self.tokens
        known = len(tokens)
        tokens.extend(path)  # then what is predicted: a period is repeated as often as needed
        start = len(tokens)
        for size in reversed(self.sizes):
            run = tokens[-size:].tobytes()
            if position := next((piece[run] for piece in self.pieces if run in piece), 0):
                for index in range(position, position + count):
                    tokens.append(tokens[index])
                break
        found = tokens[start:].tolist()
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
        self._left = PLAN_TOKENS  # that may still be indexed in this plan
        self._texts: WeakKeyDictionary[Sequence, _Text] = WeakKeyDictionary()
        self.continuation: Continuation | None = None  # set where there is a radix tree

    def begin(self) -> None:
        """A plan begins."""
        self._left = PLAN_TOKENS

    def follow(self, sequence: Sequence) -> _Text | None:
        """Index more of a sequence's prompt; None: its turn has not come."""
        text = self._texts.get(sequence)
        if text is None and self._left > 0:
            prompt = array("i", sequence.prompt.tobytes())
            text = self._texts[sequence] = _Text(prompt, self._sizes, len(prompt))
            self._left -= len(prompt) // COPIED
        while text is not None and text.num_unindexed and self._left > 0:
            self._left -= text.index()
        return text

    def __call__(self, sequence: Sequence, count: int) -> list[int]:
        text = self.follow(sequence)
        if text is None:
            return []
        # What came while nothing was proposed may be long too.
        taken = text.extend(sequence.output, max(self._left, STEP_TOKENS))
        self._left -= max(taken - STEP_TOKENS, 0)
        if text.num_output < len(sequence.output):
            return []
        pending = sequence.num_pending
        path = text.in_flight() if pending else []
        found = text.predict(path, pending + count)
        known = len(text.tokens)
        asks = not found and known >= text.asks_at and self._left > 0
        if asks and self.continuation is not None:
            self._left -= known // COPIED
            found = self.continuation(sequence, path, pending + count)
            # Asking takes time in proportion to the text, and evicted runs seldom come back.
            text.ask_interval = 1 if found else min(2 * text.ask_interval, MAX_ASK_INTERVAL)
            text.asks_at = known if found else known + text.ask_interval
        text.num_known = known
        text.lead, text.drafts = path + found[:pending], found[pending:]
        return text.drafts
