"""Formats and `structured_outputs` that bodies ask for -> what `SamplingParams` takes of them."""

import json
import re
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from minisgl.core.request import checked_structure
from minisgl.server import fields
from minisgl.server.answer import AnswerForm
from minisgl.server.body import ApiError, read_object, shown

# Field that asks for a format -> where its schema stands.
_SCHEMAS = {
    "response_format": "response_format.json_schema.schema",
    "text.format": "text.format.schema",
}
AS_IT_IS = AnswerForm()  # how an answer is read that holds nothing to be told apart


class ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class JsonSchema(msgspec.Struct):
    name: Annotated[str, msgspec.Meta(pattern=r"\A[a-zA-Z0-9_-]{1,64}\Z")]
    schema: dict[str, Any]
    strict: bool | None = None
    description: str | None = None


class Structure(NamedTuple):
    """What a text must hold to."""

    asked: dict[str, Any]  # as `SamplingParams` takes it
    by: str  # the field of the body that asks for it


def read_structured(body: fields.Choices) -> Structure | None:
    """What the text must hold to. Raises ApiError."""
    form = ResponseFormat("text")
    if body.response_format is not None:
        form = read_object(body.response_format, ResponseFormat, {}, "response_format.")
    given = form.json_schema
    if (form.type == "json_schema") != (given is not None):
        message = (
            "response_format.json_schema must be given with the type json_schema, and only then; "
            f"got {shown(given)} with {shown(form.type)}"
        )
        raise ApiError(message, param="response_format.json_schema")
    asked = None
    if given is not None:
        asked = read_object(given, JsonSchema, {}, "response_format.json_schema.")
    return structure(body, "response_format", form.type, asked)


def structure(
    body: fields.Sampling, by: str, kind: str, asked: JsonSchema | None
) -> Structure | None:
    """That of a format of this kind, which the body's field `by` asks for, or of the extra."""
    given = body.structured_outputs
    if kind == "text":
        return None if given is None else Structure(_checked(given), "structured_outputs")
    if given is not None:
        message = f"structured_outputs cannot be given with a {by} of type {kind}"
        raise ApiError(message, param="structured_outputs")
    if asked is None:
        return Structure({"json_object": True}, by)
    return Structure({"json": asked.schema, "strict": bool(asked.strict)}, by)


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    try:
        return checked_structure(given)
    except (ValueError, TypeError) as error:
        raise ApiError(str(error), param="structured_outputs") from error


def schema_of(asked: dict[str, Any], body_field: str) -> Any:
    """The schema of an answer in JSON, to stand in a grammar; None where another form is asked."""
    schema = asked.get("json", {"type": "object"} if "json_object" in asked else None)
    wrong = ""
    try:
        schema = json.loads(schema) if isinstance(schema, str) else schema
    except (ValueError, RecursionError) as error:
        wrong = f" cannot be read as JSON: {error}"
    if isinstance(schema, dict) and "x-guidance" in schema:  # the server's own word in grammars
        wrong = ": #/x-guidance: x-guidance is not supported"
    elif not isinstance(schema, dict | bool | None) and not wrong:
        wrong = f" must be a schema, an object or a boolean, got {shown(schema)}"
    if wrong:
        raise refused(f"structured_outputs.json{wrong}", body_field)
    return schema


def in_clients_words(reason: str, body_field: str | None, form: AnswerForm = AS_IT_IS) -> str:
    """What the engine says of its `structured_outputs`, by the names of what the client sent."""

    def named(found: re.Match[str]) -> str:
        names = [f"tools: parameters of {name}" for name in form.schemas]
        return [*names, "structured_outputs.json"][int(found[1])]

    if form != AS_IT_IS:  # else a grammar is the client's own, with its own numbers
        reason = re.sub(r"^structured_outputs\.grammar: %json (\d+)", named, reason)
    if (schema := _SCHEMAS.get(body_field or "")) is not None:
        for ours in ("structured_outputs.json:", "structured_outputs.json "):
            reason = reason.replace(ours, f"{schema}{ours[-1]}")
    if body_field is not None:
        reason = reason.replace("structured_outputs", body_field)
    return reason


def refused(
    reason: str, body_field: str | None, form: AnswerForm = AS_IT_IS, *, param: str | None = None
) -> ApiError:
    """The answer to what the engine refuses for its `structured_outputs`."""
    reason = in_clients_words(reason, body_field, form)
    is_of_tools = reason.startswith("tools: ")
    return ApiError(reason, param=param or ("tools" if is_of_tools else body_field))


def check_form(form: AnswerForm, body_field: str) -> AnswerForm:
    """How a structured answer is read: as it is. Raises ApiError where it would be a call's or
    reasoning's text."""
    if form.tools is not None:
        message = f"{body_field} cannot be given with tools, unless tool_choice is none"
        raise ApiError(message, param=body_field)
    if form.is_open:
        message = (
            f"{body_field} cannot be given where the chat template begins with reasoning; it may "
            'be one that chat_template_kwargs {"enable_thinking": false} turns off'
        )
        raise ApiError(message, param=body_field)
    return AS_IT_IS
