"""A grammar of an answer: reasoning, then text or tool calls, whose arguments fit their schemas.

In Lark's syntax as llguidance reads it: `%json` is a schema, `<[7]>` the token of that id. Marks
that are tokens of their own stand as these. Other tokens may spell them too, where it does no harm:
within JSON, which is read as JSON. Text that is free has none.
"""

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from minisgl.server.answer import AnswerForm
from minisgl.server.tool_formats import ToolFormat, texts

TokenId = Callable[[str], int | None]  # of a token that was added to the vocabulary

LENIENT = {"lenient": True}  # what of a schema cannot be kept is left out
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


class _Writer:
    """Rules of a grammar, and how marks stand in them."""

    def __init__(self, marks: Collection[str], token_id: TokenId) -> None:
        self.rules = list[str]()
        self.token_id = token_id
        self._marks = re.compile("(" + "|".join(map(re.escape, sorted(marks))) + ")")

    def spelled(self, text: str) -> str:
        ids = [(part, self.token_id(part)) for part in self._marks.split(text) if part]
        return " ".join(json.dumps(part) if i is None else f"<[{i}]>" for part, i in ids)

    def ending(self, name: str, mark: str) -> str:
        """Any text up to a mark, which ends it wherever it is spelled."""
        if self.token_id(mark) is None:
            self.rules.append(f"{name}[suffix={json.dumps(mark)}]: /(?s:.*)/")
            return name
        self.rules.append(f"{name.upper()}: /(?s:.*)/ & {_without(mark)}")
        return f"{name.upper()} {self.spelled(mark)}"


def _without(mark: str, before: str = "(?s:.*)") -> str:
    """A regular expression of what does not hold the mark."""
    return f"~/{before}{_escaped(mark)}(?s:.*)/"


def _escaped(text: str) -> str:
    return re.escape(text).replace("/", r"\/")


def grammar(
    form: AnswerForm,
    token_id: TokenId,
    *,
    exact: Collection[str],
    text: Mapping[str, Any] | bool | None = None,
) -> str:
    """What an answer may be.

    exact: tools whose schema is kept as a whole; of the others, what can be kept. text: a schema of
    what is no call. The schemas stand in the order of the tools, this one behind them.
    """
    writer = _Writer(form.marks, token_id)
    rules, tools, marks = writer.rules, form.tools, form.reasoning
    thought, answers = "", ["text"] * (not form.must_call)
    if tools is not None:
        is_free = not form.must_call and text is None
        answers.append(_calls(form, tools, writer, is_free))
        if is_free:
            rules.append(_text(form, tools))
    if marks is not None:
        rules.append(r"SPACE: /\s{0,4}/")
        thought = f"{writer.ending('thought', marks.closes)} SPACE"
        thought = thought if form.is_open else f"({writer.spelled(marks.opens)} {thought})?"
    for index, (name, schema) in enumerate(form.schemas.items()):
        given = {"type": "object"} | (NO_PARAMETERS if schema is None else schema)
        asked: dict[str, Any] = {} if name in exact else {**LENIENT}
        if tools is not None and tools.written:
            asked |= {"written": tools.written, "texts": texts(given)}
        given |= {"x-guidance": asked} if asked else {}
        rules.append(f"args{index}: %json {json.dumps(given)}")
    if text is not None and not form.must_call:
        rules.append(f"text: %json {json.dumps(text)}")
    return "\n".join([f"start: {thought} answer", f"answer: {' | '.join(answers)}", *rules])


def _calls(form: AnswerForm, tools: ToolFormat, writer: _Writer, is_free: bool) -> str:
    """The frame of all calls; where the answer is free, text may stand before their mark. Calls
    without one begin where the answer does, and may have it before them where it is a token."""
    spelled, token_id = writer.spelled, writer.token_id
    frame = next(f for f in tools.frames if not f.needs or token_id(f.needs) is not None)
    names = [f"{spelled(name + frame.middle)} args{i}" for i, name in enumerate(form.schemas)]
    writer.rules.append(f"call: ({' | '.join(names)}) {spelled(frame.end)}")
    more = f"({spelled(frame.between + frame.lead)} call)*" if form.most_calls > 1 else ""
    calls = f"call {more} {spelled(frame.finish)}"
    if tools.bare is not None:
        writer.rules += [f"calls: BEFORE {calls}", f"BEFORE: /{tools.bare.before}/"]
        (mark,) = tools.opens
        closed = f"({spelled(tools.closes)})?" if tools.closes and token_id(tools.closes) else ""
        return "calls" if token_id(mark) is None else f"calls | {spelled(mark)} calls {closed}"
    first = frame.start + frame.lead
    if not is_free:
        return f"{spelled(first)} {calls}"
    mark = next(mark for mark in tools.opens if first.startswith(mark))
    return f"{writer.ending('before', mark)} {spelled(first[len(mark) :])} {calls}"


def _text(form: AnswerForm, tools: ToolFormat) -> str:
    """Rules of an answer that is no call: without marks, and with nothing that is taken for one."""
    any_text = ["/(?s:.*)/", *map(_without, tools.opens)]
    begins = [_without(form.reasoning.opens, r"\s*")] if form.reasoning else []
    if tools.bare is None:
        return f"text: TEXT\nTEXT: {' & '.join(any_text + begins)}"
    bare, names = tools.bare, "|".join(map(_escaped, form.schemas))
    called = bare.called.replace("NAMES", f"({names})")
    begins += [f"~/{bare.before}(?s:.*)/", f"~/{bare.like}{called}(?s:.*)/"]
    other = " & ".join([*any_text, f"~/{called}(?s:.*)/"])
    return f"text: TEXT | BEFORE OTHER\nTEXT: {' & '.join(any_text + begins)}\nOTHER: {other}"
