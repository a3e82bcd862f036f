"""A grammar of an answer: reasoning, then text or tool calls, whose arguments fit their schemas.

In Lark's syntax as llguidance reads it: `%json` is a schema, `<[7]>` the token of that id. Marks
that are tokens of their own stand as these, for no text spells them.
"""

import json
import re
from collections.abc import Callable, Collection

from minisgl.server.answer import AnswerForm

TokenId = Callable[[str], int | None]  # of a token that was added to the vocabulary

NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def grammar(
    form: AnswerForm, token_id: TokenId, *, must_call: bool, exact: Collection[str]
) -> str | None:
    """What an answer may be; None where the form of its calls cannot be held to a grammar.

    exact: tools whose schema is kept as a whole; of the others, what can be kept. The schemas stand
    in the order of the tools.
    """
    tools, rules = form.tools, list[str]()
    assert tools is not None
    frames = (f for f in tools.frames if not f.needs or token_id(f.needs) is not None)
    if (frame := next(frames, None)) is None:
        return None

    def spelled(text: str) -> str:
        parts = re.split("(" + "|".join(map(re.escape, sorted(form.marks))) + ")", text)
        ids = [(part, token_id(part)) for part in parts if part]
        return " ".join(json.dumps(part) if i is None else f"<[{i}]>" for part, i in ids)

    def without(mark: str, before: str = "(?s:.*)") -> str:
        escaped = re.escape(mark).replace("/", r"\/")
        return f"~/{before}{escaped}(?s:.*)/"

    def ending(name: str, mark: str) -> str:
        """Any text up to a mark, which ends it wherever it is spelled."""
        if token_id(mark) is None:
            rules.append(f"{name}[suffix={json.dumps(mark)}]: /(?s:.*)/")
            return name
        rules.append(f"{name.upper()}: /(?s:.*)/ & {without(mark)}")
        return f"{name.upper()} {spelled(mark)}"

    def calls(first: str) -> str:
        more = f"({spelled(frame.between + frame.lead)} call)*" if form.most_calls > 1 else ""
        return f"{first} call {more} {spelled(frame.finish)}"

    first = frame.start + frame.lead
    mark = next((mark for mark in tools.opens if first.startswith(mark)), "")
    marks, thought = form.reasoning, ""
    text = [rf"/\s*([^{re.escape(tools.bare)}\s](?s:.*))?/" if tools.bare else "/(?s:.*)/"]
    text += [*map(without, tools.opens)]
    text += [without(marks.opens, r"\s*")] if marks else []
    if must_call:
        answer = calls(spelled(first))
    else:
        rules.append(f"TEXT: {' & '.join(text)}")
        before = "" if tools.bare else ending("before", mark)
        answer = f"TEXT | {calls(f'{before} {spelled(first[len(mark) :])}')}"
    if marks is not None:
        rules.append(r"SPACE: /\s{0,4}/")
        thought = f"{ending('thought', marks.closes)} SPACE"
        thought = thought if form.is_open else f"({spelled(marks.opens)} {thought})?"
    names = [f"{spelled(name + frame.middle)} args{i}" for i, name in enumerate(form.schemas)]
    for index, (name, schema) in enumerate(form.schemas.items()):
        given = {"type": "object"} | (NO_PARAMETERS if schema is None else schema)
        given |= {} if name in exact else {"x-guidance": {"lenient": True}}
        rules.append(f"args{index}: %json {json.dumps(given)}")
    call = f"call: ({' | '.join(names)}) {spelled(frame.end)}"
    return "\n".join([f"start: {thought} answer", f"answer: {answer}", call, *rules])
