"""`SamplingParams.structured_outputs` -> an llguidance matcher; what cannot be kept is refused."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark

from minisgl.grammar.parameters import WRITTEN, Arguments
from minisgl.grammar.schema import Reader, Refused, locate

# Where JSON may have blanks: one, or a new line indented by four for each level.
BLANKS = r"( |\n[ ]{0,%d})"
# A schema within a grammar; or a string, a comment or a regular expression, which may look so. One
# that is not closed reaches to the end of its line, and no character is read twice (`*+`).
JSON_BLOCK = re.compile(
    r'"(?:\\.|[^"\\\n])*+"?|//[^\n]*+|/(?:\\.|[^/\\\n])*+/?|(?P<json>%json)\s*+(?=[{\[tf])'
)
# The rule that a grammar begins with tells its language.
IS_LARK = re.compile(r"^[^\S\n]*+[?!]?start\b[^:\n]*+:(?!:=)", re.MULTILINE)
IS_EBNF = re.compile(r"^[^\S\n]*+root\s*+::=", re.MULTILINE)
# What llguidance says of a regular expression or of a place in a grammar, which it then repeats.
OF_REGEX = re.compile(r"regex parse error:\n {4}(.*)\n {4}( *)\^.*\nerror: (.*)")
PLACE = re.compile(r'(?:at )?(\d+)\((\d+)\): (?:invalid regex ".*" \(in \w+\): )?')
REPEATED = re.compile(r"\n +\d+ \| (?s:.*)|<non-verbose/>| while processing json-schema:\S+")
CHARACTER = re.compile(r"\\.|.", re.DOTALL)  # as a regular expression spells it
MAX_CHOICE = 4096  # characters of one: every mask costs more where it is longer
TRIED = 4  # tokens that a new grammar is tried with, before a request is
MAX_EBNF_BYTES = 2**14  # read in Python, in a time that grows with the square
MAX_SAID = 400  # characters of what llguidance says
NEAR = 20  # characters shown before and behind an error
MAX_SHOWN = 80  # characters of a grammar that is none
MAX_WARNINGS = 20
# Characters of arguments written by themselves for each of a grammar, which has so many at least.
MOST_TIMES, MIN_WRITTEN = 8, 2**13
ESCAPED = set(r"\.+*?()|[]{}^$#&-~/")  # in a regular expression

Make = Callable[[str], LLMatcher]


def compile_spec(spec: str, make: Make) -> tuple[LLMatcher, list[str]]:
    """A matcher by `make`, and warnings. Raises ValueError naming what is wrong and where."""
    given = json.loads(spec)
    if "json" in given or "json_object" in given:
        return _compile_schema(given, make)
    ((kind, what),) = given.items()
    schemas: list[Any] = []
    warnings: list[str] = []
    if kind == "choice":
        text = LLMatcher.grammar_from_regex(_choice(what))
    elif kind == "regex":
        text = LLMatcher.grammar_from_regex(what)
    else:
        lark, schemas, warnings = with_schemas_read(as_lark(what))
        text = LLMatcher.grammar_from_lark(lark)
    matcher = make(text)
    if error := first_error(matcher):
        for index, schema in enumerate(schemas):  # it may be by one of these
            with _place_of(index):
                _compile_schema({"json": schema}, make)
        regex = what if kind == "regex" else None
        reason = said(error, pattern=regex, has_lines=kind == "grammar" and not is_ebnf(what))
        raise ValueError(f"structured_outputs.{kind}: {reason}")
    return matcher, warnings


def first_error(matcher: LLMatcher) -> str:
    """What is wrong with a new matcher: it was not compiled, or nothing fits it."""
    if matcher.is_error():
        return matcher.get_error()
    begun = matcher.deep_copy()
    for _ in range(TRIED):
        mask = int.from_bytes(begun.compute_bitmask(), "little")
        if begun.is_error():
            return begun.get_error()
        if not mask and not begun.is_accepting():
            return "it is unsatisfiable: no text fits it"
        first = (mask & -mask).bit_length() - 1
        if begun.is_stopped() or begun.try_consume_tokens([first]) == 0:  # it may end here
            break
    return begun.get_error()


def said(error: str, *, pattern: str | None = None, has_lines: bool = True) -> str:
    """What llguidance says, in the user's terms. `pattern`: the whole that was given, of which it
    repeats another spelling; has_lines: whether its lines are those that the user wrote."""

    def at_character(found: re.Match[str]) -> str:
        text, before, reason = found.groups()
        at = len(before)
        if pattern is not None:
            index = len(CHARACTER.findall(text[:at]))
            text, at = pattern, sum(map(len, CHARACTER.findall(pattern)[:index]))
        return f"character {at}: {reason}, near {text[max(0, at - NEAR) : at + NEAR]!r}"

    error = PLACE.sub(r"line \1, column \2: " if has_lines and pattern is None else "", error, 1)
    error = " ".join(REPEATED.sub("", OF_REGEX.sub(at_character, error)).split())
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

    def compiled(schema: Any) -> LLMatcher:
        # Options need an object; what x-guidance a client sends has been refused.
        text = json.dumps(schema if isinstance(schema, dict) else {})
        return make(LLMatcher.grammar_from_json_schema(text, overrides=_options(reader)))

    try:
        matcher = compiled(schema)
        if first_error(matcher):
            raise Refused(*locate(schema, lambda part: first_error(compiled(part))))
    except ValueError as error:
        raise ValueError(said(f"structured_outputs.json: {error}")) from error
    return matcher, _first(reader.warnings)


def _options(reader: Reader) -> Any:
    return {"whitespace_pattern": BLANKS % (4 * reader.levels), "coerce_one_of": True}


def _first(warnings: list[str]) -> list[str]:
    more = len(warnings) - MAX_WARNINGS
    return [*map(said, warnings[:MAX_WARNINGS]), *([f"and {more} more"] if more > 0 else [])]


def with_schemas_read(lark: str) -> tuple[str, list[Any], list[str]]:
    """The grammar with each schema behind `%json` checked as one that comes by itself; these; and
    warnings, of those with `"x-guidance": {"lenient": true}`. With `written` there, the grammar is
    of arguments in that form of calls, of which `texts` are no JSON."""
    made, schemas, warnings, at = list[str](), list[Any](), list[str](), 0
    rules = list[str]()
    while found := JSON_BLOCK.search(lark, at):
        begin, at = at, found.end()
        made.append(lark[begin:at])
        if found["json"] is None:
            continue
        with _place_of(len(schemas)):
            schema, at = json.JSONDecoder().raw_decode(lark, at)
            asked = _asked(schema)
            reader = Reader(schema, strict="lenient" not in asked)
            schema = reader.read()
            schemas.append(schema if isinstance(schema, dict) else {})
            if "written" in asked:
                name = f"written_{len(schemas)}"
                made[-1] = f"{lark[begin : found.start('json')]}{name} "
                form, texts = asked["written"], asked["texts"]
                rules += Arguments(name, form, texts, schemas[-1], reader, _options(reader)).rules
            else:
                made.append(json.dumps(schemas[-1] | {"x-guidance": _options(reader)}))
        place = f"structured_outputs.grammar: %json {len(schemas) - 1}"
        warnings += [f"{place}: {each}" for each in reader.warnings]
    if (size := sum(map(len, rules))) > (most := max(len(lark), MIN_WRITTEN) * MOST_TIMES):
        reason = f"schemas become a grammar of {size} characters, which may have {most}"
        raise ValueError(f"structured_outputs.grammar: {reason}")
    return "".join([*made, "\n".join([lark[at:], *rules])]), schemas, _first(warnings)


def _asked(schema: Any) -> dict[str, Any]:
    """What the server asks of a schema in a grammar of its own, which is taken out of it."""
    given = schema.get("x-guidance") if isinstance(schema, dict) else None
    if not isinstance(given, dict) or given.get("lenient", True) is not True:
        return {}
    if how := given.keys() - {"lenient"}:
        form, texts = given.get("written"), given.get("texts")
        if how != {"written", "texts"} or not isinstance(form, str) or form not in WRITTEN:
            return {}
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return {}
    return dict(schema.pop("x-guidance"))


@contextmanager
def _place_of(index: int) -> Iterator[None]:
    """Says of a wrong schema which of the grammar's it is."""
    try:
        yield
    except RecursionError:
        raise ValueError(f"structured_outputs.grammar: %json {index}: nested too deeply") from None
    except ValueError as error:
        reason = str(error).removeprefix("structured_outputs.json: ")
        raise ValueError(said(f"structured_outputs.grammar: %json {index}: {reason}")) from error


def _choice(texts: list[Any]) -> str:
    """A regular expression of which exactly these texts are instances."""
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not 0 < len(text) <= MAX_CHOICE:
            found = text if isinstance(text, str) else json.dumps(text)
            message = f"must be a string of 1 to {MAX_CHOICE} characters, got {found!r}"
            raise ValueError(said(f"structured_outputs.choice[{index}] {message}"))
    if not texts:
        raise ValueError("structured_outputs.choice must hold at least 1 string, got 0")
    return "|".join("".join(map(_escaped, text)) for text in dict.fromkeys(texts))


def _escaped(character: str) -> str:
    if character in ESCAPED:
        return f"\\{character}"
    return character if character.isprintable() else f"\\x{{{ord(character):x}}}"


def is_ebnf(text: str) -> bool:
    """Whether a grammar is in EBNF as llama.cpp writes it, else in Lark's syntax. Raises ValueError
    where it is neither."""
    if IS_EBNF.search(text) is not None:
        return True
    if IS_LARK.search(text) is None:
        raise ValueError(
            "structured_outputs.grammar must be Lark with a line `start: ...`, or EBNF with a line "
            f"`root ::= ...`, got {text[:MAX_SHOWN]!r}"
        )
    return False


def as_lark(text: str) -> str:
    """A grammar in either language, in Lark's syntax."""
    if not is_ebnf(text):
        return text
    if len(text) > MAX_EBNF_BYTES:
        raise ValueError(
            f"structured_outputs.grammar must have at most {MAX_EBNF_BYTES} characters where it is "
            f"EBNF (`root ::= ...`), got {len(text)}"
        )
    try:
        return gbnf_to_lark(text)
    except Exception as error:  # its own kinds, and IndexError and such for what is no grammar
        raise ValueError(said(f"structured_outputs.grammar: {error}")) from error
