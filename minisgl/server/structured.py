"""`response_format` and `structured_outputs` of a body -> what `SamplingParams` takes of them."""

from typing import Annotated, Any, Literal

import msgspec

from minisgl.server import fields
from minisgl.server.answer import AnswerForm
from minisgl.server.body import ApiError, read_object, shown

SCHEMA = "response_format.json_schema."


class ResponseFormat(msgspec.Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None


class JsonSchema(msgspec.Struct):
    name: Annotated[str, msgspec.Meta(pattern=r"\A[a-zA-Z0-9_-]{1,64}\Z")]
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


def read_structured(body: fields.Sampling) -> dict[str, Any] | None:
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
    if form.type == "text":
        return body.structured_outputs
    if body.structured_outputs is not None:
        message = f"structured_outputs cannot be given with a response_format of type {form.type}"
        raise ApiError(message, param="structured_outputs")
    if given is None:
        return {"json_object": True}
    asked = read_object(given, JsonSchema, {}, "response_format.json_schema.")
    schema = {"type": "object"} if asked.schema is None else asked.schema
    return {"json": schema, "strict": bool(asked.strict)}


def refused(reason: str, body_field: str | None, param: str | None = None) -> ApiError:
    """The answer to what the engine refuses for its `structured_outputs`, by the client's names."""
    if body_field == "response_format":
        for ours in ("structured_outputs.json:", "structured_outputs.json "):
            reason = reason.replace(ours, f"response_format.json_schema.schema{ours[-1]}")
    if body_field is not None:
        reason = reason.replace("structured_outputs", body_field)
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
    return AnswerForm()
