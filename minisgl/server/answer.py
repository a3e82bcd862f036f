"""What a model wrote -> its reasoning, its text and its tool calls, as they come."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from minisgl.server.reading import News, Reader, Reading
from minisgl.server.tool_formats import Schemas, ToolFormat


class ReasoningFormat(NamedTuple):
    """How reasoning stands before an answer."""

    sign: str  # what a chat template that knows it holds
    opens: str
    closes: str


REASONING_FORMATS = {
    "think": ReasoningFormat("<think>", "<think>", "</think>"),
    "mistral": ReasoningFormat("[THINK]", "[THINK]", "[/THINK]"),
    "cohere": ReasoningFormat("<|START_THINKING|>", "<|START_THINKING|>", "<|END_THINKING|>"),
    "seed": ReasoningFormat("<seed:think>", "<seed:think>", "</seed:think>"),
}


@dataclass(frozen=True)
class AnswerForm:
    """How the answers to one call are read."""

    reasoning: ReasoningFormat | None = None
    tools: ToolFormat | None = None
    schemas: Schemas = field(default_factory=dict)  # the parameters of each tool
    most_calls: float = float("inf")
    is_open: bool = False  # the prompt ends in reasoning's opening mark
    finish_reason: str = "tool_calls"  # where there are calls
    holds_text: bool = False  # to a schema: an answer is text as a whole, or calls
    must_call: bool = False  # and is held to that: what is no reasoning is the frame of calls

    @property
    def marks(self) -> set[str]:
        """Special tokens that are part of the text here."""
        found = {self.reasoning.opens, self.reasoning.closes} if self.reasoning else set[str]()
        if self.tools is not None:
            found |= {*self.tools.opens, self.tools.closes, *self.tools.inner}
        return found - {""}


class AnswerParser(Reader):
    """Reads one answer, fed however its text is cut. `end` once, when it has ended.

    Reasoning stands where the answer begins. Spaces around it and before calls are no text.
    Anything that only looks like a call or a mark is text.
    """

    def __init__(self, form: AnswerForm) -> None:
        super().__init__(form.most_calls)
        self._form = form
        self._reading = self._read()
        next(self._reading)

    def push(self, text: str) -> list[News]:
        return self.feed(text, self._reading)

    def end(self) -> list[News]:
        """What is left, when nothing more will come."""
        self._reading.close()
        rest = "".join(self.held)
        if self.kind == "reasoning" or (self.num_calls and not rest.strip()):
            rest = rest.rstrip()
        is_frame = self._form.must_call or (self._form.holds_text and self.num_calls > 0)
        if self.kind != "arguments" and not (self.kind == "text" and is_frame):
            self.say(rest)  # else a call or its frame broke off
        return self.news()

    @property
    def has_calls(self) -> bool:
        """Whether calls are shown, each written to its end."""
        return 0 < min(self.num_calls, self._form.most_calls) == self.num_ended

    def _read(self) -> Reading[None]:
        yield
        if self._form.reasoning is not None:
            yield from self._reason(self._form.reasoning)
        tools = self._form.tools
        if tools is not None and tools.bare:
            if (yield from self.space()) == tools.bare.first:
                self.give_back()
                yield from self._call(tools, known=True)
            else:
                self.give_back(len(self.held))
        marks = tools.opens if tools else ()
        if self._form.holds_text and not (yield from self.any_of(marks)):
            marks = ()
        while True:
            yield from self.say_until(marks)
            if tools is not None:
                yield from self._call(tools, known=False)

    def _reason(self, marks: ReasoningFormat) -> Reading[None]:
        yield from self.skip_space()
        if not (yield from self.literal(marks.opens)) and not self._form.is_open:
            self.give_back(len(self.held))
            return
        self.held.clear()
        self.kind = "reasoning"
        yield from self._drop_space()
        yield from self.say_until([marks.closes])
        self.held.clear()
        self.kind = "text"
        yield from self._drop_space()

    def _call(self, tools: ToolFormat, known: bool) -> Reading[None]:
        is_call = yield from tools.read(self, self._form.schemas, known)
        if not is_call:
            self.say("".join(self.held))
            return
        self.kind = "text"
        self.held.clear()
        if tools.closes:
            yield from self.skip_space()
            if (yield from self.literal(tools.closes)):
                self.held.clear()

    def _drop_space(self) -> Reading[None]:
        yield from self.skip_space()
        self.held.clear()


F = TypeVar("F", ReasoningFormat, ToolFormat)


def chosen(name: str, formats: Mapping[str, F], template: str) -> F | None:
    """The form of this name; where it is "auto", the one that the chat template shows."""
    shown = (form for form in formats.values() if form.sign in template)
    return next(shown, None) if name == "auto" else formats.get(name)


def told(name: str, formats: Mapping[str, F], form: F | None) -> str:
    """The name of the form that was chosen, and why, for a log."""
    if name != "auto":
        return f"{name} (as asked)"
    if form is None:
        return "none (the chat template shows no form that is known)"
    own = next(each for each in formats if formats[each] is form)
    return f"{own} (the chat template holds {form.sign})"
