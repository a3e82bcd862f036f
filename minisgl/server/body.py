"""JSON bodies -> typed structs. An `ApiError` names the field, the limit and the value given."""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args

import msgspec
import numpy as np

MAX_COMMAS = 1_200_000  # between values of a body: a prompt of a million token ids has fewer
MAX_CONTAINERS = 20_000  # arrays and objects in a body
CHUNK = 2**16  # bytes looked at before other threads may run
MAX_SHOWN = 80  # characters of anything a client sent that an error repeats

T = TypeVar("T")

# What bodies of other engines, or of another API, call our fields and what is within them.
ELSEWHERE = {
    "structured_outputs.json": "guided_json json_schema",
    "structured_outputs.regex": "guided_regex regex",
    "structured_outputs.choice": "guided_choice",
    "structured_outputs.grammar": "guided_grammar grammar ebnf",
    "max_tokens": "max_new_tokens n_predict max_completion_tokens max_output_tokens",
    "max_output_tokens": "max_new_tokens n_predict max_completion_tokens max_tokens",
    "repetition_penalty": "repeat_penalty",
    "chat_template_kwargs.enable_thinking": "enable_thinking",
    "function.name": "name",
    "function.parameters": "parameters input_schema",
}
# Fields that are not supported -> the values that ask for nothing, or None: whatever the value is,
# it could not change the answer. null always asks for nothing.
Neutral = Mapping[str, tuple[Any, ...] | None]


class ApiError(Exception):
    """An answer in OpenAI's error shape."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {"message": message, "type": type, "param": param, "code": code},
        }


def read(content: bytes, kind: type[T], neutral: Neutral) -> T:
    """A body as `kind`, after the name of every field has been checked."""
    return read_object(decode(content), kind, neutral)


def decode(content: bytes) -> dict[str, Any]:
    """The fields of a body."""
    check_work(content)
    try:
        body = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ApiError("the body is nested too deeply") from error
    if not isinstance(body, dict):
        raise ApiError(f"the body must be a JSON object, got {shown(body)}")
    return body


def check_work(content: bytes, where: str = "the body") -> None:
    """Refuses JSON of so many values that parsing it, in one go, would hold up other calls."""
    for name, signs, most in (
        ("commas between values", b",", MAX_COMMAS),
        ("arrays and objects", b"[{", MAX_CONTAINERS),
    ):
        found = sum(map(content.count, signs))
        if found > most and (found := _outside_strings(content, signs)) > most:
            raise ApiError(f"{where} must hold at most {most} {name}, got {found}")


def _outside_strings(content: bytes, signs: bytes) -> int:
    """How often one of `signs` stands in JSON, strings left out."""
    plain = content.replace(rb"\\", b"").replace(rb"\"", b"")  # other quotes enclose strings
    found = inside = 0
    for start in range(0, len(plain), CHUNK):
        characters = np.frombuffer(plain[start : start + CHUNK], np.uint8)
        quoted = (np.cumsum(characters == ord('"')) + inside) % 2
        found += int(np.isin(characters[quoted == 0], list(signs)).sum())
        inside = quoted[-1]
    return found


def read_object(given: dict[str, Any], kind: type[T], neutral: Neutral, path: str = "") -> T:
    """An object within a body, at `path` ("messages[0]."), as `kind`.

    The first field that is none of `kind`'s and not neutral is refused. null asks for nothing,
    whatever the field.
    """
    known: tuple[str, ...] = kind.__struct_fields__  # type: ignore[attr-defined]
    kept = {}
    for name, value in given.items():
        param = path + name[:MAX_SHOWN]
        if name in known:
            kept[name] = value
        elif value is None:
            continue
        elif name not in neutral:
            near = [ours for ours, names in ELSEWHERE.items() if name in names.split()]
            near = [ours for ours in near if ours.split(".")[0] in known]
            near = near or difflib.get_close_matches(name[:MAX_SHOWN], known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            message = f"{path}{cut(name)} is not a field that is supported{hint}"
            raise ApiError(message, param=param, code="unknown_parameter")
        elif not _asks_for_nothing(value, allowed := neutral[name]):
            may = f"; it may be {alternatives(allowed)}" if allowed else ""
            message = f"{param} is not supported, got {shown(value)}{may}"
            raise ApiError(message, param=param, code="unsupported_parameter")
    return convert(kept, kind, path)


def convert(given: Any, kind: type[T], path: str = "") -> T:
    """`given` as `kind`; `path` is where it stands in the body ("messages[0].")."""
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        place = place.rstrip("`")
        param = (path + place.removeprefix(".")).rstrip(".")
        if missing := re.search(r"missing required field `(\w+)`", reason):
            param = f"{param}.{missing[1]}".lstrip(".")
            raise ApiError(f"{param} is required", param=param) from error
        value = _at(given, place)
        got = "" if value is msgspec.UNSET else f", got {shown(value)}"
        expected = reason[0].lower() + reason.split(", got")[0][1:]
        if expected.startswith("invalid enum value"):
            allowed = get_args(kind.__annotations__[place.removeprefix(".")])
            raise ApiError(f"{param} must be {alternatives(allowed)}{got}", param=param) from error
        raise ApiError(f"{param or 'the body'}: {expected}{got}", param=param or None) from error


def alternatives(values: Sequence[Any]) -> str:
    """Values of which a field may have one."""
    return " or ".join(filter(None, [", ".join(map(shown, values[:-1])), shown(values[-1])]))


def shown(value: Any) -> str:
    """A wrong value as JSON, cut when it is long."""
    text = ""
    try:
        for piece in json.JSONEncoder(ensure_ascii=False).iterencode(value):
            text += piece
            if len(text) > MAX_SHOWN:  # what follows would be written in vain
                return cut(text) if isinstance(value, str) else f"{text[:MAX_SHOWN]}..."
    except RecursionError:
        return "a value nested too deeply to show"
    return text


def cut(text: str, most: int = MAX_SHOWN) -> str:
    """The beginning of a text, and how long it is, when it has more than `most` characters."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text)} characters)"


def _asks_for_nothing(value: Any, neutral: tuple[Any, ...] | None) -> bool:
    # True is not 1
    return neutral is None or any(type(value) is type(n) and value == n for n in neutral)


def _at(value: Any, path: str) -> Any:
    """The value at a path like `.stop[1]` of a body; UNSET where the path is not exact."""
    for name, index in re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", path):
        try:
            value = value[name] if name else value[int(index)]
        except (LookupError, TypeError, ValueError):
            return msgspec.UNSET
    return value
