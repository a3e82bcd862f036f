"""Tools of a chat body, and the calls of its messages -> what a chat template and a parser get."""

import dataclasses
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from minisgl.server import fields
from minisgl.server.answer import AnswerForm, ReasoningFormat
from minisgl.server.body import ApiError, alternatives, check_work, read_object, shown
from minisgl.server.chat_template import marked
from minisgl.server.frames import LENIENT, grammar
from minisgl.server.structured import AS_IT_IS, Structure, check_form, schema_of
from minisgl.server.tokenizer import Tokenizer
from minisgl.server.tool_formats import TOOL_FORMATS, ToolFormat

MAX_TOOLS = 1024  # of one body
MAX_CALLS = 1024  # of one message
# None, a word, or the name of the one that must be called, behind where it stands in the body.
Choice = str | tuple[str, str] | None
CHOICES = ("none", "auto", "required")


@dataclass(frozen=True)
class Tools:
    """What may be called in an answer, and what must be."""

    functions: Sequence[fields.Function] = ()
    must_call: bool = False
    named: str | None = None  # the one that must be called, once
    parallel: bool = True

    @property
    def most_calls(self) -> float:
        return 1 if self.named or not self.parallel else float("inf")

    def for_template(self) -> list[dict[str, Any]]:
        """As a chat template shows them, without what is no business of the model's."""
        return [{"type": "function", "function": _for_template(each)} for each in self.functions]


def read_tools(body: fields.ChatBody) -> Tools:
    """None where none may be called. Raises ApiError."""
    functions: dict[str, fields.Function] = {}
    at_most(MAX_TOOLS, len(body.tools or ()), "tools")
    for index, given in enumerate(body.tools or ()):
        path = f"tools[{index}]."
        tool = read_object(given, fields.Tool, fields.NEUTRAL_TOOL, path)
        path += "function."
        functions[path] = read_object(tool.function, fields.Function, fields.NEUTRAL_TOOL, path)
    asked, parallel = body.tool_choice, body.parallel_tool_calls is not False
    if not isinstance(asked, dict):
        return chosen_tools(functions, asked, parallel=parallel)
    tool, path = read_object(asked, fields.Tool, {}, "tool_choice."), "tool_choice.function."
    chosen = read_object(tool.function, fields.Chosen, {}, path)
    return chosen_tools(functions, (f"{path}name", chosen.name), parallel=parallel)


def chosen_tools(functions: dict[str, fields.Function], choice: Choice, *, parallel: bool) -> Tools:
    """The functions, by where they stand in the body, of which the choice leaves these."""
    names = set[str]()
    for path, function in functions.items():
        if function.name in names:
            message = f"{path}name must be another for each tool, got {shown(function.name)} twice"
            raise ApiError(message, param=f"{path}name")
        names.add(function.name)
        _check_parameters(function.parameters or {}, f"{path}parameters")
    named = None
    if isinstance(choice, tuple):
        where, named = choice
        if named not in names:
            message = f"{where} must be the name of one of tools, got {shown(named)}"
            raise ApiError(message, param=where)
    elif choice is not None and choice not in CHOICES:
        message = f"tool_choice must be a tool, {alternatives(CHOICES)}, got {shown(choice)}"
        raise ApiError(message, param="tool_choice")
    elif choice == "required" and not names:
        raise ApiError("tool_choice needs tools, got none", param="tool_choice")
    elif choice == "none":
        return Tools()
    must_call = choice not in (None, "auto")
    return Tools([*functions.values()], must_call, named, parallel)


def _check_parameters(schema: dict[str, Any], path: str) -> None:
    """Arguments are an object."""
    if schema.get("type", "object") not in ("object", ["object"]):
        message = f'{path}.type must be "object", got {shown(schema["type"])}'
        raise ApiError(message, param=f"{path}.type")
    if "x-guidance" in schema:  # the server's own word in grammars
        raise _not_supported(f"{path}.x-guidance", schema["x-guidance"])


def _for_template(function: fields.Function) -> dict[str, Any]:
    given = msgspec.structs.asdict(function)
    return {name: value for name, value in given.items() if value is not None and name != "strict"}


def answer_form(
    tools: Tools,
    frame: str,
    tool_format: ToolFormat | None,
    reasoning: ReasoningFormat | None,
) -> AnswerForm:
    """How the answer is read. `frame` is the prompt without the texts of its messages."""
    if reasoning is not None and frame.rstrip().endswith(reasoning.closes):
        reasoning = None  # the template has closed it: there is none
    is_open = reasoning is not None and frame.rstrip().endswith(reasoning.opens)
    if not tools.functions:
        return AnswerForm(reasoning, is_open=is_open)
    schemas = {function.name: function.parameters for function in tools.functions}
    wrong = []
    if marked(next(iter(schemas))) not in frame:
        wrong.append("--chat-template FILE, for this model's own chat template leaves tools out")
    if tool_format is None:
        forms = f"--tool-call-parser, one of {list(TOOL_FORMATS)}"
        wrong.append(f"{forms}, unless the template shows one of these forms")
    if tool_format is None or wrong:
        message = f"tools need a server with {', and with '.join(wrong)}"
        message += f"; got {len(tools.functions)} tools"
        raise ApiError(message, param="tools", code="unsupported_parameter")
    ended = "stop" if tools.named else "tool_calls"  # as OpenAI has it
    kept = {tools.named: schemas[tools.named]} if tools.named else schemas
    most, must_call = tools.most_calls, tools.must_call
    return AnswerForm(reasoning, tool_format, kept, most, is_open, ended, must_call=must_call)


def held_to(
    form: AnswerForm,
    tools: Tools,
    structure: Structure | None,
    tokenizer: Tokenizer,
    *,
    ends_freely: bool,
) -> tuple[dict[str, Any] | None, AnswerForm]:
    """What `structured_outputs` hold an answer to, and how it is read then.

    A grammar where it must call, where calls are exact, and where JSON stands behind reasoning or
    may be a call instead. And wherever there may be calls: these fit their schemas as far as these
    can be kept. They are left free where the body has a say in when an answer ends, with which no
    grammar goes.
    """
    can = form.tools is not None and ends_freely
    exact = {each.name for each in tools.functions if each.strict} & {*form.schemas}
    must = form.must_call or bool(exact) or structure is not None
    text: Any = None
    if structure is not None:
        asked, by = structure
        if form == AS_IT_IS:
            return asked, form
        text = schema_of(asked, by)
        if text is None or (form.tools is not None and form.tools.bare):
            return asked, check_form(form, by)
        if isinstance(text, dict) and not asked.get("strict", True):
            text = text | {"x-guidance": LENIENT}
        form = dataclasses.replace(form, holds_text=True)
    elif not (must or can):
        return None, form
    made = grammar(form, tokenizer.added_id, exact=exact, text=text)
    return {"grammar": made}, form


def read_messages(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages for a chat template, `developer` as `system`. Raises ApiError."""
    messages, calls = [], set[str]()
    for index, each in enumerate(given):
        path = f"messages[{index}]."
        message = _message(path, each)
        messages.append(message)
        if message["role"] != "tool":
            calls = {call["id"] for call in message.get("tool_calls", ())}
        elif (answered := message.get("tool_call_id")) not in calls:
            wrong = (
                f"{path}tool_call_id must be an id of the tool_calls of the assistant's message "
                f"before it, of which there are {len(calls)}; got {shown(answered)}"
            )
            raise ApiError(wrong, param=f"{path}tool_call_id")
    functions = {
        f"messages[{index}].tool_calls[{i}].function.arguments": call["function"]
        for index, message in enumerate(messages)
        for i, call in enumerate(message.get("tool_calls", ()))
    }
    read_arguments(functions)
    return messages


def read_arguments(functions: dict[str, dict[str, Any]]) -> None:
    """Has the arguments of called functions, by where they stand in the body, as objects."""
    arguments = (function["arguments"].encode() for function in functions.values())
    check_work(b",".join(arguments), "the arguments of tool calls")
    for path, function in functions.items():  # templates write objects as JSON
        function["arguments"] = _object(path, function["arguments"])


def _message(path: str, given: dict[str, Any]) -> dict[str, Any]:
    parsed = read_object(given, fields.MessageBody, fields.NEUTRAL_MESSAGE, path)
    for name, role in (("tool_calls", "assistant"), ("tool_call_id", "tool")):
        if getattr(parsed, name) and parsed.role != role:
            message = f"{path}{name} needs the role {role}, got {shown(parsed.role)}"
            raise ApiError(message, param=f"{path}{name}")
    if parsed.content is None and parsed.role != "assistant":  # which may have said nothing
        raise ApiError(f"{path}content is required", param=f"{path}content")
    content: Any = parsed.content or ""
    if not isinstance(content, str):
        content = [_part(f"{path}content[{i}].", part) for i, part in enumerate(content)]
    calls = parsed.tool_calls or []
    at_most(MAX_CALLS, len(calls), f"{path}tool_calls")
    optional = {
        "name": parsed.name,
        "reasoning_content": parsed.reasoning_content,
        "tool_calls": [_call(f"{path}tool_calls[{i}].", call) for i, call in enumerate(calls)],
        "tool_call_id": parsed.tool_call_id,
    }
    role = "system" if parsed.role == "developer" else parsed.role
    kept = {name: value for name, value in optional.items() if value not in (None, [])}
    return {"role": role, "content": content} | kept


def _part(path: str, given: dict[str, Any]) -> dict[str, Any]:
    """A part of a message's content: its type and its text."""
    return msgspec.structs.asdict(read_object(given, fields.TextPart, fields.NEUTRAL_PART, path))


def _call(path: str, given: dict[str, Any]) -> dict[str, Any]:
    call = read_object(given, fields.ToolCall, fields.NEUTRAL_TOOL_CALL, path)
    function = read_object(call.function, fields.CalledFunction, {}, f"{path}function.")
    return {"id": call.id, "type": "function", "function": msgspec.structs.asdict(function)}


def _object(param: str, text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ApiError(f"{param} must be a JSON object, got {shown(text)}", param=param) from error


def new_call(form: ToolFormat | None, name: str) -> dict[str, Any]:
    """A call of the answer's that begins."""
    made = uuid.uuid4().hex
    call_id = made[: form.id_length] if form and form.id_length else f"call_{made}"
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": ""}}


def at_most(limit: int, found: int, param: str) -> None:
    if found > limit:
        raise ApiError(f"{param} must hold at most {limit}, got {found}", param=param)


def _not_supported(param: str, value: Any) -> ApiError:
    message = f"{param} is not supported, got {shown(value)}"
    return ApiError(message, param=param, code="unsupported_parameter")
