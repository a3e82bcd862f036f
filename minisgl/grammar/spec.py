"""`SamplingParams.structured_outputs` -> an llguidance matcher; what cannot be kept is refused."""

import json
from collections.abc import Callable
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from minisgl.grammar.schema import Reader, Refused, locate

# Where JSON may have blanks: one, or a new line indented by four for each level.
BLANKS = r"( |\n[ ]{0,%d})"
MAX_SAID = 400  # characters of what llguidance says, which repeats the grammar
MAX_WARNINGS = 20
ESCAPED = set(r"\.+*?()|[]{}^$#&-~/")  # in a regular expression

Make = Callable[[str], LLMatcher]


def compile_spec(spec: str, make: Make) -> tuple[LLMatcher, list[str]]:
    """A matcher by `make`, and warnings. Raises ValueError naming what is wrong and where."""
    given = json.loads(spec)
    if "json" in given or "json_object" in given:
        return _compile_schema(given, make)
    ((kind, what),) = given.items()
    if kind == "choice":
        text = LLMatcher.grammar_from_regex(_choice(what))
    elif kind == "regex":
        text = LLMatcher.grammar_from_regex(what)
    else:
        text = LLMatcher.grammar_from_lark(_lark(what))
    matcher = make(text)
    if error := first_error(matcher):
        raise ValueError(f"structured_outputs.{kind}: {said(error)}")
    return matcher, []


def first_error(matcher: LLMatcher) -> str:
    """What is wrong with a new matcher: it was not compiled, or nothing fits it."""
    if matcher.is_error():
        return matcher.get_error()
    begun = matcher.deep_copy()
    for _ in range(2):
        allowed = any(begun.compute_bitmask())
        if begun.is_error():
            return begun.get_error()
        if not allowed and not begun.is_accepting():
            return "it is unsatisfiable: no text fits it"
        forced = begun.compute_ff_tokens()
        if not forced or not begun.consume_tokens(forced):
            break
    return begun.get_error()


def said(error: str) -> str:
    error = " ".join(error.replace("<non-verbose/>", "").split())
    return error if len(error) <= MAX_SAID else f"{error[:MAX_SAID]}..."


def _compile_schema(given: dict[str, Any], make: Make) -> tuple[LLMatcher, list[str]]:
    schema = given.get("json", {"type": "object"})
    try:
        if isinstance(schema, str):
            schema = json.loads(schema)
        reader = Reader(schema, strict=given.get("strict", True))
        schema = reader.read()
    except RecursionError:
        raise ValueError("structured_outputs.json: schemas are nested too deeply") from None
    except ValueError as error:
        raise ValueError(said(f"structured_outputs.json: {error}")) from error
    if schema is False:
        raise ValueError("structured_outputs.json: #: the schema is unsatisfiable: it is false")

    def compiled(schema: Any) -> LLMatcher:
        # Options need an object; what x-guidance a client sends has been refused.
        text = json.dumps(schema if isinstance(schema, dict) else {})
        options: Any = {"whitespace_pattern": BLANKS % (4 * reader.levels)}
        return make(LLMatcher.grammar_from_json_schema(text, overrides=options))

    try:
        matcher = compiled(schema)
        if wrong := first_error(matcher):
            place = locate(schema, wrong, lambda part: first_error(compiled(part)))
            raise Refused(place, wrong)
    except ValueError as error:
        raise ValueError(said(f"structured_outputs.json: {error}")) from error
    warnings = [said(each) for each in reader.warnings[:MAX_WARNINGS]]
    if (more := len(reader.warnings) - MAX_WARNINGS) > 0:
        warnings.append(f"and {more} more")
    return matcher, warnings


def _choice(texts: list[Any]) -> str:
    """A regular expression of which exactly these texts are instances."""
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text:
            found = text if isinstance(text, str) else json.dumps(text)
            message = f"must be a string that is not empty, got {found!r}"
            raise ValueError(said(f"structured_outputs.choice[{index}] {message}"))
    if not texts:
        raise ValueError("structured_outputs.choice must hold at least 1 string, got 0")
    return "|".join("".join(map(_escaped, text)) for text in dict.fromkeys(texts))


def _escaped(character: str) -> str:
    if character in ESCAPED:
        return f"\\{character}"
    return character if character.isprintable() else f"\\x{{{ord(character):x}}}"


def _lark(text: str) -> str:
    """A grammar in Lark's syntax, or in EBNF as llama.cpp writes it (`root ::= ...`)."""
    try:
        return any_to_lark(text)
    except Exception as error:  # its own kinds, and IndexError and such for what is no grammar
        raise ValueError(said(f"structured_outputs.grammar: {error}")) from error
