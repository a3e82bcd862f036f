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
from minisgl.server.tool_formats import texts

TokenId = Callable[[str], int | None]  # of a token that was added to the vocabulary

LENIENT = {"lenient": True}  # what of a schema cannot be kept is left out
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def _without(mark: str, before: str = "(?s:.*)") -> str:
    """A regular expression of what does not hold the mark."""
    escaped = re.escape(mark).replace("/", r"\/")
    return f"~/{before}{escaped}(?s:.*)/"


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
    tools, rules = form.tools, list[str]()

    def spelled(text: str) -> str:
        parts = re.split("(" + "|".join(map(re.escape, sorted(form.marks))) + ")", text)
        ids = [(part, token_id(part)) for part in parts if part]
        return " ".join(json.dumps(part) if i is None else f"<[{i}]>" for part, i in ids)

    def ending(name: str, mark: str) -> str:
        """Any text up to a mark, which ends it wherever it is spelled."""
        if token_id(mark) is None:
            rules.append(f"{name}[suffix={json.dumps(mark)}]: /(?s:.*)/")
            return name
        rules.append(f"{name.upper()}: /(?s:.*)/ & {_without(mark)}")
        return f"{name.upper()} {spelled(mark)}"

    marks, thought, answers = form.reasoning, "", ["text"] * (not form.must_call)
    is_free = not form.must_call and text is None
    if tools is not None:
        has_all = (f for f in tools.frames if not f.needs or token_id(f.needs) is not None)
        frame = next(has_all)
        first = frame.start + frame.lead
        mark = next((mark for mark in tools.opens if first.startswith(mark)), "")
        before = spelled(first)
        if is_free and not tools.bare:  # text may stand before calls
            before = f"{ending('before', mark)} {spelled(first[len(mark) :])}"
        more = f"({spelled(frame.between + frame.lead)} call)*" if form.most_calls > 1 else ""
        answers.append(f"{before} call {more} {spelled(frame.finish)}")
        names = [f"{spelled(name + frame.middle)} args{i}" for i, name in enumerate(form.schemas)]
        rules.append(f"call: ({' | '.join(names)}) {spelled(frame.end)}")
        plain = [rf"/\s*([^{re.escape(tools.bare)}\s](?s:.*))?/" if tools.bare else "/(?s:.*)/"]
        plain += [*map(_without, tools.opens), *([_without(marks.opens, r"\s*")] if marks else [])]
        if is_free:
            rules.append(f"text: TEXT\nTEXT: {' & '.join(plain)}")
    if marks is not None:
        rules.append(r"SPACE: /\s{0,4}/")
        thought = f"{ending('thought', marks.closes)} SPACE"
        thought = thought if form.is_open else f"({spelled(marks.opens)} {thought})?"
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
