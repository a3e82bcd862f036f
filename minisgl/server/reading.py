"""A text that comes in pieces, read by generators that wait where it has not come yet.

So what is read depends on the whole text only, never on where it was cut.
"""

import re
from collections.abc import Callable, Generator, Sequence
from itertools import groupby
from typing import Literal, NamedTuple, TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]  # waits for text, returns what it read

# What of a JSON value holds nothing to look at: in quotes, in brackets, and by itself.
_STRING, _INNER, _PLAIN = map(re.compile, (r'[^"\\]+', r'[^"\[\]{}]+', r'[^"\[\]{},\s]+'))


class News(NamedTuple):
    """What is new of an answer. A call's name comes once and whole, its arguments in fragments."""

    kind: Literal["text", "reasoning", "name", "arguments"]
    text: str
    call: int  # whose name or arguments these are


class Reader:
    """Characters that were read are `held` until they are said, dropped or given back."""

    def __init__(self, most_calls: float) -> None:
        self.held: list[str] = []
        self.kind: Literal["text", "reasoning", "name", "arguments"] = "text"  # of what is said
        self.num_calls = 0  # those beyond the limit included
        self.num_ended = 0  # of those within it
        self._most_calls = most_calls
        self._news: list[News] = []
        self._text, self._at = "", 0
        self._again: list[str] = []  # given back, the next one last

    def feed(self, text: str, reading: Reading[None]) -> list[News]:
        """Lets `reading` go on with more text."""
        self._text, self._at = text, 0
        next(reading)
        return self.news()

    def news(self) -> list[News]:
        """What was said since the last time, in as few pieces as may be."""
        said, self._news = self._news, []
        if len(said) < 2:
            return said
        groups = groupby(said, lambda news: (news.kind, news.call))
        return [News(kind, "".join(n.text for n in g), call) for (kind, call), g in groups]

    def say(self, text: str) -> None:
        """This is of the answer, and settles what is held."""
        self.held.clear()
        is_call = self.kind in ("name", "arguments")
        if text and not (is_call and self.num_calls > self._most_calls):
            self._news.append(News(self.kind, text, max(self.num_calls - 1, 0) if is_call else 0))

    def begin_call(self, name: str) -> None:
        self.num_calls += 1
        self.kind = "name"
        self.say(name)
        self.kind = "arguments"

    def end_call(self) -> None:
        self.num_ended += self.num_calls <= self._most_calls
        self.kind = "text"
        self.held.clear()

    def read(self) -> Reading[str]:
        """The next character."""
        while not self._again and self._at == len(self._text):
            yield
        if self._again:
            char = self._again.pop()
        else:
            char = self._text[self._at]
            self._at += 1
        self.held.append(char)
        return char

    def run(self, pattern: re.Pattern[str]) -> str:
        """What fits of the text that is there, in one go. It is not held."""
        found = None if self._again else pattern.match(self._text, self._at)
        if found is None:
            return ""
        self._at = found.end()
        return found[0]

    def give_back(self, count: int = 1) -> None:
        """The last characters are read once more."""
        first = len(self.held) - count
        self._again += reversed("".join(self.held[first:]))
        del self.held[first:]

    def space(self) -> Reading[str]:
        """The next character that is no space."""
        while (char := (yield from self.read())).isspace():
            pass
        return char

    def skip_space(self) -> Reading[None]:
        yield from self.space()
        self.give_back()

    def literal(self, text: str) -> Reading[bool]:
        """Whether this follows; nothing is read where it does not."""
        for index, wanted in enumerate(text, start=1):
            if (yield from self.read()) != wanted:
                self.give_back(index)
                return False
        return True

    def any_of(self, texts: Sequence[str]) -> Reading[bool]:
        """Whether one of these follows; nothing is read."""
        for text in texts:
            if (yield from self.literal(text)):
                self.give_back(len(text))
                return True
        return False

    def item(self, end: str) -> Reading[bool]:
        """Whether another item of a list follows, behind commas; else its `end` is read."""
        while (char := (yield from self.space())) == ",":
            pass
        if char != end:
            self.give_back()
        return char != end

    def word(self, pattern: re.Pattern[str]) -> Reading[str]:
        """The characters that follow and fit, each by itself."""
        found: list[str] = []
        while pattern.match(char := (yield from self.read())):
            found.append(char)
        self.give_back()
        return "".join(found)

    def json_value(self, char: str, take: Callable[[str], object]) -> Reading[None]:
        """A JSON value that begins with `char`, which was read, given to `take` as it comes."""
        depth, quoted = 0, False
        while True:
            take(char)
            if quoted and char == "\\":
                take((yield from self.read()))
            elif char == '"':
                quoted = not quoted
            elif not quoted:
                depth += (char in "[{") - (char in "]}")
            if depth <= 0 and not quoted and char in '"]}':
                return
            if run := self.run(_STRING if quoted else _INNER if depth else _PLAIN):
                self.held.append(run)
                take(run)
            char = yield from self.read()
            if not depth and not quoted and (char in ",]}" or char.isspace()):
                self.give_back()
                return

    def say_until(self, marks: Sequence[str]) -> Reading[None]:
        """Says what comes before a mark, which is held then, with the spaces before it."""
        firsts = "".join({re.escape(mark[0]) for mark in marks})
        word = rf"[^{firsts}\s]+"
        plain = re.compile(rf"{word}(?:\s+{word})*" if firsts else r"(?s:.+)")
        tail = ""  # of what is held: the beginning of a mark, maybe
        while True:
            while not tail and (run := self.run(plain)):
                self.say("".join(self.held) + run)
                if self._at == len(self._text):
                    yield  # what comes next may be plain too
            tail += yield from self.read()
            if tail in marks:
                return
            while tail and not any(mark.startswith(tail) for mark in marks):
                char, tail = tail[0], tail[1:]
                if not (marks and char.isspace()):
                    end = len(self.held) - len(tail)
                    settled, self.held[:end] = "".join(self.held[:end]), []
                    kept = [*self.held]
                    self.say(settled)
                    self.held += kept
