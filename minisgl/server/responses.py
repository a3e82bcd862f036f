"""Bodies of /v1/responses, OpenAI's Responses API -> calls.

Nothing is stored: a body holds all that was said, and what would need a memory is refused.
"""

import dataclasses
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from minisgl.core.request import NEUTRAL
from minisgl.server import fields
from minisgl.server.body import ApiError, Neutral, alternatives, decode, read_object, shown
from minisgl.server.calls import (
    Call,
    Conversation,
    ServedModel,
    asked_logprobs,
    check_model,
    conversation_call,
)
from minisgl.server.structured import JsonSchema, structure
from minisgl.server.tools import MAX_TOOLS, Tools, at_most, chosen_tools, read_arguments

LOGPROBS = "message.output_text.logprobs"  # what `include` may hold

Json = dict[str, Any]
Key = Annotated[str, msgspec.Meta(max_length=64)]
Label = Annotated[str, msgspec.Meta(max_length=512)]


class ResponsesBody(fields.Sampling, kw_only=True):
    input: str | list[Json]
    instructions: str | None = None
    max_output_tokens: fields.Int | None = None
    text: Json | None = None
    reasoning: Json | None = None
    tools: list[Json] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    top_logprobs: fields.Int | None = None
    chat_template_kwargs: Json | None = None
    # labels, which the answer repeats
    metadata: Annotated[dict[Key, Label], msgspec.Meta(max_length=16)] | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None


class Text(msgspec.Struct):
    format: Json | None = None


class AllowedTools(msgspec.Struct):
    mode: Literal["auto", "required"]
    tools: list[Json]


# Input items, and parts of what they hold. Their `type` says which they are.


class Message(msgspec.Struct):
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Json]


class Reasoning(msgspec.Struct):
    content: list[Json] | None = None


class FunctionCall(fields.CalledFunction, kw_only=True):
    call_id: str


class FunctionCallOutput(msgspec.Struct):
    call_id: str
    output: str | list[Json]


class Part(msgspec.Struct):
    text: str


_NEUTRAL: Neutral = {
    **dict.fromkeys(("access_programs", "context_management", "conversation", "image"), ()),
    **dict.fromkeys(("moderation", "previous_response_id", "prompt"), ()),
    "background": (False,),
    "max_tool_calls": None,  # of built-in tools, of which there are none
    "prompt_cache_options": ({"mode": "implicit"},),
    "prompt_cache_retention": ("in_memory",),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "truncation": ("disabled",),
}
_NEUTRAL_REASONING: Neutral = {
    **dict.fromkeys(("effort", "generate_summary", "summary"), ()),
    "context": ("auto",),
    "mode": ("standard",),
}
_NEUTRAL_TOOL: Neutral = {
    **fields.NEUTRAL_TOOL,
    "output_schema": (),
    "allowed_callers": (["direct"],),
    "async": (False,),
    "defer_loading": (False,),
}
# What a client sends back of an earlier answer, beside what was said.
_NEUTRAL_ITEM: Neutral = {
    **dict.fromkeys(("encrypted_content", "namespace", "phase"), ()),
    **dict.fromkeys(("id", "status")),
    "async": (False,),
    "caller": ({"type": "direct"},),
    "summary": ([],),
}
_NEUTRAL_PART: Neutral = {
    **fields.NEUTRAL_PART,
    **dict.fromkeys(("logprobs", "prompt_cache_breakpoint")),  # every prompt is cached
}
_FORMATS = {"text": fields.Empty, "json_object": fields.Empty, "json_schema": JsonSchema}
_FUNCTION = {"function": fields.Chosen}
_ITEMS = {
    "message": Message,
    "reasoning": Reasoning,
    "function_call": FunctionCall,
    "function_call_output": FunctionCallOutput,
}
# What an answer repeats as it was given, or as null.
_REPEATED = ("instructions", "max_output_tokens", "prompt_cache_key", "safety_identifier", "user")


def parse_response(content: bytes, model: ServedModel) -> Call:
    """A body of /v1/responses. Raises ApiError."""
    body = read_object(decode(content), ResponsesBody, _NEUTRAL)
    check_model(body, model)
    read_object(body.reasoning or {}, fields.Empty, _NEUTRAL_REASONING, "reasoning.")
    options = body.stream_options or {}
    read_object(options, fields.Empty, fields.NEUTRAL_STREAM, "stream_options.")
    text = read_object(body.text or {}, Text, {"verbosity": ("medium",)}, "text.")
    given = text.format or {"type": "text"}
    form = _of_type(given, _FORMATS, {}, "text.format.")
    schema = form if isinstance(form, JsonSchema) else None
    said = Conversation(
        where="input",
        messages=_read_messages(body),
        template_options=body.chat_template_kwargs or {},
        tools=_read_tools(body),
        structure=structure(body, "text.format", given["type"], schema),
        max_tokens=body.max_output_tokens,
        limit="max_output_tokens",
        logprobs=_read_logprobs(body),
    )
    call = conversation_call("response", f"resp_{uuid.uuid4().hex}", said, body, model)
    drawn = call.params.completed({**NEUTRAL, **model.sampling_defaults})
    repeated = {name: getattr(body, name) for name in _REPEATED} | {
        "background": False,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "store": False,
        "temperature": drawn.temperature,
        "text": {"format": given, "verbosity": "medium"},
        "tool_choice": body.tool_choice or "auto",
        "tools": [{"strict": False, "parameters": None, **tool} for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": drawn.top_p,
        "truncation": "disabled",
    }
    return dataclasses.replace(call, repeated=repeated)


def _of_type(given: Json, kinds: Mapping[str, type[Any]], neutral: Neutral, path: str) -> Any:
    """An object at `path`, as the kind that its type says."""
    kind = given.get("type", "message" if "message" in kinds else None)
    if not isinstance(kind, str) or kind not in kinds:
        message = f"{path}type must be {alternatives([*kinds])}, got {shown(kind)}"
        raise ApiError(message, param=f"{path}type", code="unsupported_parameter")
    own = {name: value for name, value in given.items() if name != "type"}
    return read_object(own, kinds[kind], neutral, path)


def _read_logprobs(body: ResponsesBody) -> int | None:
    for index, name in enumerate(body.include or ()):
        if name != LOGPROBS:
            message = f"include[{index}] must be {LOGPROBS}, got {shown(name)}"
            raise ApiError(message, param=f"include[{index}]", code="unsupported_parameter")
    return asked_logprobs(body.top_logprobs, bool(body.include), f"include to hold {LOGPROBS}")


def _read_tools(body: ResponsesBody) -> Tools:
    """What may be called. Tools that are not allowed are not shown to the model either."""
    given, parallel = body.tools or [], body.parallel_tool_calls is not False
    at_most(MAX_TOOLS, len(given), "tools")
    functions = {}
    for index, each in enumerate(given):
        path = f"tools[{index}]."
        functions[path] = _of_type(each, {"function": fields.Function}, _NEUTRAL_TOOL, path)
    if not isinstance(body.tool_choice, dict):
        return chosen_tools(functions, body.tool_choice, parallel=parallel)
    kinds = _FUNCTION | {"allowed_tools": AllowedTools}
    choice = _of_type(body.tool_choice, kinds, {}, "tool_choice.")
    if isinstance(choice, fields.Chosen):
        return chosen_tools(functions, ("tool_choice.name", choice.name), parallel=parallel)
    allowed = set[str]()
    for index, each in enumerate(choice.tools):
        path = f"tool_choice.tools[{index}]."
        name = _of_type(each, _FUNCTION, {}, path).name
        chosen_tools(functions, (f"{path}name", name), parallel=parallel)
        allowed.add(name)
    kept = {path: each for path, each in functions.items() if each.name in allowed}
    return chosen_tools(kept, choice.mode, parallel=parallel)


def _read_messages(body: ResponsesBody) -> list[Json]:
    """The items as messages for a chat template. What the model said in one go is one of them."""
    messages: list[Json] = []
    if body.instructions is not None:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    functions: dict[str, Json] = {}  # that were called, by where their arguments stand
    calls = set[str]()
    for index, given in enumerate(body.input):
        path = f"input[{index}]."
        last: Json = messages[-1] if messages else {"role": None}
        item = _of_type(given, _ITEMS, _NEUTRAL_ITEM, path)
        if isinstance(item, FunctionCall):
            if last["role"] != "assistant":
                messages.append(last := {"role": "assistant", "content": ""})
            functions[f"{path}arguments"] = own = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": own}
            last.setdefault("tool_calls", []).append(call)
            calls.add(item.call_id)
            continue
        if isinstance(item, FunctionCallOutput) and item.call_id not in calls:
            message = (
                f"{path}call_id must be that of a function_call before it, of which there are "
                f"{len(calls)}; got {shown(item.call_id)}"
            )
            raise ApiError(message, param=f"{path}call_id")
        said = _message(item, path)
        if said.keys() == {"role", "content"} and said["role"] == "assistant" and _is_thought(last):
            last["content"] = said["content"]
        else:
            messages.append(said)
    if not messages:
        raise ApiError("input must hold at least one item, got 0", param="input")
    read_arguments(functions)
    return messages


def _is_thought(message: Json) -> bool:
    """Whether it holds reasoning, and nothing else yet."""
    return message.keys() == {"role", "content", "reasoning_content"} and not message["content"]


def _message(item: Message | Reasoning | FunctionCallOutput, path: str) -> Json:
    match item:
        case Reasoning():
            thought = _texts(item.content or [], ("reasoning_text",), f"{path}content")
            text = "".join(part["text"] for part in thought)
            return {"role": "assistant", "content": "", "reasoning_content": text}
        case FunctionCallOutput():
            content = _content(item.output, f"{path}output")
            return {"role": "tool", "content": content, "tool_call_id": item.call_id}
    role = "system" if item.role == "developer" else item.role
    return {"role": role, "content": _content(item.content, f"{path}content")}


def _content(given: str | list[Json], path: str) -> str | list[Json]:
    return given if isinstance(given, str) else _texts(given, ("input_text", "output_text"), path)


def _texts(given: list[Json], kinds: tuple[str, ...], path: str) -> list[Json]:
    """Parts of these kinds, as chat templates know them."""
    named = dict.fromkeys(kinds, Part)
    parts = (_of_type(p, named, _NEUTRAL_PART, f"{path}[{i}].") for i, p in enumerate(given))
    return [{"text": part.text, "type": "text"} for part in parts]
