"""How models write tool calls: one row for each form, and a reading for each syntax.

A reading stands behind the mark that opens calls. It begins a call once its name is certain and
says its arguments as JSON, as they come. It returns False where something else than calls follows,
what it has read of that being still held: it is text.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec

from minisgl.server.reading import Reader, Reading

Schemas = Mapping[str, Any]  # the parameters of each tool

TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_NAME_CHARS = re.compile(r"[A-Za-z0-9_.-]")
_UP_TO_ANGLE = re.compile(r"[^>\n]")
_IDENTIFIER = re.compile(r"[^\s=,()]")
_PYTHON_WORD = re.compile(r"[\w.+-]")
_HEX = re.compile(r"[0-9A-Fa-f]")
_NOT_IN = {quote: re.compile(rf"[^{quote}\\]+") for quote in "'\""}
_NO_END = re.compile(r"[^<\n]+")

_WORDS = {"True": "true", "False": "false", "None": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "a": "\a", "v": "\v", "0": "\0"}
_ESCAPES |= {"\\": "\\", "'": "'", '"': '"', "/": "/", "\n": ""}
_TEXTS = ({"string"}, {"string", "null"})
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_KINDS = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object"}


def _json_calls(reader: Reader, tools: Schemas, known: bool) -> Reading[bool]:
    """`{"name": ..., "arguments": {...}}`: one, several behind commas or semicolons, or a list."""
    called = False
    while (char := (yield from reader.space())) in "[{,;":
        if char == "{":
            if not (yield from _json_call(reader, tools, known)):
                return False
            called = True
    if char != "]":
        reader.give_back()
    return called


def _json_call(reader: Reader, tools: Schemas, known: bool) -> Reading[bool]:
    begun = said = False
    early = ""  # arguments that came before the name
    while (yield from reader.item("}")):
        if not (yield from reader.literal('"')):
            break
        key: list[str] = []
        yield from reader.json_value('"', key.append)
        name, value = "".join(key)[1:-1], list[str]()
        if (yield from reader.space()) != ":":
            reader.give_back()
            break
        if known and not begun and name not in ("name", "type"):
            return False
        char = yield from reader.space()
        is_arguments = name in ("arguments", "parameters")
        if is_arguments and begun and not said and char == "{":
            yield from reader.json_value(char, reader.say)
            said = True
            continue
        yield from reader.json_value(char, value.append)
        if name == "name" and not begun:
            called = _decoded("".join(value))
            if not _is_tool(called, tools, known):
                return False
            reader.begin_call(called)
            begun, said = True, bool(early)
            reader.say(early)
        elif is_arguments and not said:
            early = _as_object("".join(value))
            if begun:
                reader.say(early)
                said = True
        elif known and not begun and "".join(value) != '"function"':  # of another type
            return False
    else:
        if begun:
            reader.say("" if said else "{}")
            reader.end_call()
        return begun
    if said:  # the object is not closed, but all that matters of it is there
        reader.give_back(len(reader.held))
        reader.end_call()
    return begun


def _is_tool(name: object, tools: Schemas, known: bool) -> bool:
    return isinstance(name, str) and bool(name in tools if known else TOOL_NAME.fullmatch(name))


def _decoded(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        pass
    with suppress(ValueError, RecursionError):  # a number may be larger than a machine's
        return json.loads(text, parse_int=float, parse_constant=_refuse)
    return msgspec.UNSET


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _as_object(text: str) -> str:
    """Arguments that are no object: none, or an object within a string."""
    value = _decoded(text)
    return "{}" if value is None else value if isinstance(value, str) else text


def _mistral_calls(reader: Reader, tools: Schemas, known: bool) -> Reading[bool]:
    """A list in JSON, or `name[ARGS]{...}`, with `[CALL_ID]...` between them or without marks."""
    char = yield from reader.space()
    reader.give_back()
    if char in "[{":
        return (yield from _json_calls(reader, tools, known))
    name = yield from reader.word(_NAME_CHARS)
    if not TOOL_NAME.fullmatch(name):
        return False
    if (yield from reader.literal("[CALL_ID]")):
        yield from reader.word(_NAME_CHARS)
    yield from reader.literal("[ARGS]")
    if (yield from reader.space()) != "{":
        reader.give_back()
        return False
    reader.begin_call(name)
    yield from reader.json_value("{", reader.say)
    reader.end_call()
    return True


def _xml_calls(reader: Reader, tools: Schemas, known: bool) -> Reading[bool]:
    """`<function=name>` with a `<parameter=key>` for each, whose values are plain text."""
    yield from reader.skip_space()
    if not (yield from reader.literal("<function=")):
        return False
    name = (yield from reader.word(_UP_TO_ANGLE)).strip()
    if not TOOL_NAME.fullmatch(name) or not (yield from reader.literal(">")):
        return False
    reader.begin_call(name)
    schema, lead = _mapping(tools.get(name)), "{"
    properties = _mapping(schema.get("properties"))
    while True:
        yield from reader.skip_space()
        if not (yield from reader.literal("<parameter=")):
            break
        key = yield from reader.word(_UP_TO_ANGLE)
        if not (yield from reader.literal(">")):
            return True
        reader.say(f"{lead}{json.dumps(key, ensure_ascii=False)}: ")
        lead = ", "
        yield from _xml_value(reader, properties.get(key, schema.get("additionalProperties")))
    if (yield from reader.literal("</function>")):
        reader.say("{}" if lead == "{" else "}")
        reader.end_call()
    return True


def _xml_value(reader: Reader, schema: Any) -> Reading[None]:
    """A text as it comes where it is a string, else whole: it may be a number or an object, within
    whose strings no mark ends it."""
    value: list[str] = []
    types = _types(schema)
    streams, is_json = types == {"string"}, bool(schema) and schema is not True
    is_json = is_json and types not in _TEXTS
    in_string = is_escaped = False
    take: Callable[[str], object] = value.append
    if streams:
        reader.say('"')
        take = lambda text: reader.say(_escaped(text))  # noqa: E731
    yield from reader.literal("\n")
    while in_string or not (yield from _xml_end(reader)):
        piece = (yield from reader.read()) + reader.run(_NO_END)
        take(piece)
        for char in piece if is_json and value[0][0] in '"[{' else ():
            in_string ^= char == '"' and not is_escaped
            is_escaped = in_string and char == "\\" and not is_escaped
    reader.say('"' if streams else _typed("".join(value), types))


def _xml_end(reader: Reader) -> Reading[bool]:
    """Whether a value ends here: another parameter or the call's end follows its closing mark."""
    before = len(reader.held)
    yield from reader.literal("\n")
    if (yield from reader.literal("</parameter>")):
        yield from reader.skip_space()
        if (yield from reader.any_of(("<parameter=", "</function>"))):
            return True
    reader.give_back(len(reader.held) - before)
    return False


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _types(schema: Any) -> set[str]:
    """Those that a schema names; none where it might be anything."""
    schema, found = _mapping(schema), set[str]()
    for branch in (schema, *_list(schema.get("anyOf")), *_list(schema.get("oneOf"))):
        kinds = _mapping(branch).get("type")
        found |= {kind for kind in (*_list(kinds), kinds) if isinstance(kind, str)}
    return found


def texts(schema: Mapping[str, Any]) -> list[str]:
    """The parameters whose values any text is good for: of strings, or of strings and null. An
    empty name stands for those that the schema does not name."""
    schemas = {**_mapping(schema.get("properties")), "": schema.get("additionalProperties")}
    return [name for name, of in schemas.items() if _types(of) in _TEXTS]


def _typed(text: str, types: set[str]) -> str:
    """A value written as plain text, as JSON of one of the types."""
    plain = _WORDS.get(text.strip(), text.strip())
    if types in _TEXTS and plain != "null":
        return json.dumps(text, ensure_ascii=False)
    value = _decoded(plain)
    kind = _KINDS.get(type(value), "null" if value is None else "array")
    fits = not types or kind in types or (kind == "integer" and "number" in types)
    if value is msgspec.UNSET or not (fits or "string" not in types):
        return json.dumps(text, ensure_ascii=False)
    return plain


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _python_calls(reader: Reader, tools: Schemas, known: bool) -> Reading[bool]:
    """`[f(a=1, b="x"), g()]`, whose values are Python's literals."""
    if (yield from reader.space()) != "[":
        reader.give_back()
        return False
    while (yield from reader.item("]")):
        name, lead = (yield from reader.word(_NAME_CHARS)), "{"
        if not _is_tool(name, tools, known) or not (yield from reader.literal("(")):
            return False
        while (yield from reader.item(")")):
            key = yield from reader.word(_IDENTIFIER)
            if not key.isidentifier() or (yield from reader.space()) != "=":
                reader.give_back()
                return lead != "{"
            if lead == "{":
                reader.begin_call(name)
            reader.say(f"{lead}{json.dumps(key)}: ")
            lead = ", "
            yield from _python_value(reader)
        if lead == "{":
            reader.begin_call(name)
        reader.say("{}" if lead == "{" else "}")
        reader.end_call()
    return True


def _python_value(reader: Reader) -> Reading[None]:
    closers: list[str] = []
    between = ""  # said before what follows it: a last comma stands for nothing
    while True:
        char = yield from reader.space()
        if not closers and char in ",)]}":
            reader.give_back()
            return
        if char in ",:":
            between = f"{char} "
            continue
        before, between = between, ""
        if char in ")]}":
            reader.say(closers.pop())
        elif char in "([{":
            closers.append("}" if char == "{" else "]")
            reader.say(before + ("{" if char == "{" else "["))
        elif char in "'\"":
            reader.say(f'{before}"')
            yield from _python_string(reader, char)
        else:
            word = char + (yield from reader.word(_PYTHON_WORD))
            is_key = closers[-1:] == ["}"] and (yield from reader.space()) == ":"
            if closers[-1:] == ["}"]:
                reader.give_back()
            reader.say(before + (json.dumps(word) if is_key else _python_word(word)))


def _python_word(word: str) -> str:
    if _decoded(word) is not msgspec.UNSET:
        return word
    try:
        number = float(word)
        return repr(number) if math.isfinite(number) else json.dumps(word)
    except ValueError:
        return _WORDS.get(word) or json.dumps(word, ensure_ascii=False)


def _python_string(reader: Reader, quote: str) -> Reading[None]:
    while True:
        reader.say(_escaped(reader.run(_NOT_IN[quote])))
        char = yield from reader.read()
        if char == quote:
            return reader.say('"')
        if char == "\\":
            kind = yield from reader.read()
            digits = ""
            while len(digits) < _HEX_DIGITS.get(kind, 0):
                if not _HEX.match(digit := (yield from reader.read())):
                    reader.give_back()
                    break
                digits += digit
            char = _ESCAPES.get(kind, char + kind + digits)
            if len(digits) == _HEX_DIGITS.get(kind) and int(digits, 16) < 0x110000:
                char = chr(int(digits, 16))
        # Half of a surrogate pair can only be written as an escape.
        is_half = "\ud800" <= char[:1] <= "\udfff"
        reader.say(json.dumps(char)[1:-1] if is_half else _escaped(char))


class Frame(NamedTuple):
    """What stands around the names and the arguments of calls, for a grammar."""

    lead: str  # before each name
    middle: str
    end: str
    start: str = ""  # before all calls
    between: str = ""
    finish: str = ""
    needs: str = ""  # a token that the vocabulary must have


class Bare(NamedTuple):
    """How calls of known tools begin where an answer does, without a mark: regular expressions."""

    first: str  # character
    before: str  # up to a name, as a grammar has it
    like: str  # up to a name, as the reading takes it
    called: str  # behind that: what makes it a call of one of the NAMES


class ToolFormat(NamedTuple):
    """One form. `sign` is what a chat template that teaches it holds."""

    sign: str
    opens: tuple[str, ...]  # marks before calls
    closes: str  # the mark behind them, which may be missing
    read: Callable[[Reader, Schemas, bool], Reading[bool]]
    frames: tuple[Frame, ...]  # the first whose token the vocabulary has; the last needs none
    bare: Bare | None = None
    inner: tuple[str, ...] = ()  # further marks
    id_length: int | None = None  # of a call's id, where a template wants one
    written: str = ""  # how arguments are that are no JSON


_OBJECT = Bare(
    "{",
    r'\s{0,4}\{\s{0,4}("type"\s{0,4}:\s{0,4}"function"\s{0,4},\s{0,4})?"name"\s{0,4}:\s{0,4}"',
    r'\s*\{[\s,]*("type"\s*:\s*"function"[\s,]*)*"name"\s*:\s*"',
    r'(NAMES"|[^"]*\\)',
)
_LIST = Bare("[", r"\s{0,4}\[\s{0,4}", r"\s*\[", r"[\s,]*NAMES\(")
_TAGS = ("<tool_call>",), "</tool_call>"
_TAGGED = Frame('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>", between="\n")
_LISTED = Frame('{"name": "', '", "arguments": ', "}", "[TOOL_CALLS][", ", ", "]")
_MARKED = Frame("[TOOL_CALLS]", "[ARGS]", "", needs="[ARGS]")
_BARE = Frame('{"name": "', '", "parameters": ', "}", between="; ")
_FUNCTION = Frame("<tool_call>\n<function=", ">\n", "</function>\n</tool_call>", between="\n")
_CALLED = Frame("", "(", ")", "[", ", ", "]")
_INNER = ("[ARGS]", "[CALL_ID]")

# Where signs of several stand in a template, the first counts.
TOOL_FORMATS = {
    "qwen3_coder": ToolFormat("<function=", *_TAGS, _xml_calls, (_FUNCTION,), written="xml"),
    "hermes": ToolFormat("<tool_call>", *_TAGS, _json_calls, (_TAGGED,)),
    "mistral": ToolFormat(
        "[TOOL_CALLS]", ("[TOOL_CALLS]",), "", _mistral_calls, (_MARKED, _LISTED), None, _INNER, 9
    ),
    "pythonic": ToolFormat(
        "func_name1(",
        ("<|python_start|>",),
        "<|python_end|>",
        _python_calls,
        (_CALLED,),
        _LIST,
        written="python",
    ),
    "llama3_json": ToolFormat(
        '"parameters": dictionary', ("<|python_tag|>",), "", _json_calls, (_BARE,), _OBJECT
    ),
}
