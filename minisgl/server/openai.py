"""Bodies of OpenAI's API -> valid requests, parsed once. Invalid ones are answered 400 here.

Every field of a body is used, or refused by name. A field that is not supported may be sent with
a value that asks for nothing (`"tools": []`).
"""

import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import msgspec

from minisgl.core.executor import Limits
from minisgl.core.request import MAX_TOP_LOGPROBS, Request, SamplingParams
from minisgl.server import fields
from minisgl.server.answer import AnswerForm, ReasoningFormat
from minisgl.server.body import ApiError, convert, cut, decode, read, read_object, shown
from minisgl.server.echo import Echo
from minisgl.server.structured import read_structured, refused
from minisgl.server.tokenizer import Tokenizer
from minisgl.server.tool_formats import ToolFormat
from minisgl.server.tools import answer_form, held_to, read_messages, read_tools

MAX_PROMPTS = 1024  # in one completions body
MAX_CHOICES = 1024  # in one answer
MAX_LOGPROBS = 2**20  # in one answer that is not streamed, or echoed: 30 MB, of a chat 80 MB
MAX_TEMPLATE_WORDS = 200  # characters of a template's refusal, which may repeat a message
COMPLETION_TOKENS = 16  # max_tokens of a completions body that names none: OpenAI's


@dataclass(frozen=True)
class ServedModel:
    """What a body is checked against."""

    name: str
    tokenizer: Tokenizer
    limits: Limits
    sampling_defaults: Mapping[str, float] = field(default_factory=dict)
    has_priorities: bool = True  # whether requests run in order of priority
    tool_format: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    created: int = field(default_factory=lambda: int(time.time()))


@dataclass(frozen=True)
class Call:
    """One API call: its requests (several prompts, several requests) and how to answer."""

    id: str
    kind: Literal["chat", "completion"]
    model: str
    requests: list[Request]
    stream: bool
    stream_options: fields.StreamOptions
    echo: list[Echo] | None = None  # per request, where it is wanted
    form: AnswerForm = field(default_factory=AnswerForm)
    structured_by: str | None = None  # the body's field that asks for structured output
    warnings: list[str] = field(default_factory=list)  # of that; filled in when the engine says so
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def params(self) -> SamplingParams:
        """Equal for all requests but for the seed and for a max_tokens that the body left out."""
        return self.requests[0].params


# Fields that a body and `SamplingParams` have alike; the others need converting.
_SHARED = {*fields.Sampling.__struct_fields__} & {*SamplingParams.__struct_fields__}
_SHARED -= {"logit_bias", "structured_outputs"}
_RENDER_OPTIONS = {"messages", "tools", "documents", "add_generation_prompt"}


def parse_chat(content: bytes, model: ServedModel) -> Call:
    """A body of /v1/chat/completions. Raises ApiError."""
    given = decode(content)
    uncalled = "none" in (given.get("tool_choice"), given.get("function_call"))
    neutral = fields.NEUTRAL_UNCALLED if uncalled else fields.NEUTRAL_CHAT
    body = read_object(given, fields.ChatBody, neutral)
    _check_model(body, model)
    messages, tools = read_messages(body.messages), read_tools(body)
    variables = body.chat_template_kwargs or {}
    for name in sorted(_RENDER_OPTIONS & variables.keys()):
        param = f"chat_template_kwargs.{name}"
        raise ApiError(f"{param} is not supported", param=param)
    try:
        text, frame = model.tokenizer.render_both(messages, tools=tools or None, **variables)
    except ValueError as error:
        raise ApiError(cut(str(error), MAX_TEMPLATE_WORDS), param="messages") from error
    calls = (call for each in messages for call in each.get("tool_calls", ()))
    if (first := next(calls, None)) and first["function"]["name"] not in frame:
        message = "messages hold tool_calls, which this model's chat template leaves out"
        raise ApiError(message, param="messages")
    form = answer_form(tools, frame, body, model.tool_format, model.reasoning)
    prompt = _encode(text, "messages", model, add_special_tokens=False)
    limit_name, max_tokens = _max_completion_tokens(body)
    structured, form = held_to(form, body, model.tokenizer)
    logprobs = _chat_logprobs(body)
    params = _params(body, model, structured, max_tokens=max_tokens, logprobs=logprobs)
    _check_prompt(prompt, "messages", params, limit_name, model)
    call_id = f"chatcmpl-{uuid.uuid4().hex}"
    return Call(
        id=call_id,
        kind="chat",
        model=model.name,
        requests=[_request(call_id, prompt, params, body, model)],
        stream=bool(body.stream),
        stream_options=_stream_options(body),
        form=form,
        structured_by=_structured_by(body) if params.structured_outputs else None,
    )


def parse_completion(content: bytes, model: ServedModel) -> Call:
    """A body of /v1/completions. Raises ApiError."""
    body = read(content, fields.CompletionBody, fields.NEUTRAL_COMPLETION)
    _check_model(body, model)
    if body.best_of is not None and body.best_of != (body.n or 1):
        message = f"best_of must equal n ({body.n or 1}): nothing is ranked; got {body.best_of}"
        raise ApiError(message, param="best_of")
    echo_logprobs = body.logprobs if body.echo else None
    if echo_logprobs is not None and (body.n or 1) > 1:
        raise ApiError(f"echo with logprobs needs n = 1, got {body.n}", param="echo")
    params = _params(
        body,
        model,
        read_structured(body),
        max_tokens=body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=echo_logprobs,
    )
    call_id = f"cmpl-{uuid.uuid4().hex}"
    requests, echoes, num_echoed = [], [], 0
    prompts = _prompts(body.prompt)
    if (choices := len(prompts) * params.n) > MAX_CHOICES:
        message = f"n must ask for at most {MAX_CHOICES} choices of all prompts, got {choices}"
        raise ApiError(message, param="n")
    for index, (param, prompt) in enumerate(prompts):
        ids = _encode(prompt, param, model) if isinstance(prompt, str) else prompt
        room = _check_prompt(ids, param, params, "max_tokens", model)
        limit = body.max_tokens or min(room, max(COMPLETION_TOKENS, params.min_tokens))
        own = msgspec.structs.replace(params, max_tokens=limit)
        requests.append(_request(f"{call_id}-{index}", ids, own, body, model))
        if echo_logprobs is not None:
            num_echoed += len(ids)
            check_answer(num_echoed, echo_logprobs)
        if body.echo:
            echoes.append(Echo.of(prompt, ids, model.tokenizer, echo_logprobs is not None))
    return Call(
        id=call_id,
        kind="completion",
        model=model.name,
        requests=requests,
        stream=bool(body.stream),
        stream_options=_stream_options(body),
        echo=echoes or None,
        structured_by=_structured_by(body) if params.structured_outputs else None,
    )


def check_answer(num_tokens: int, top: int | None) -> None:
    """Refuses an answer with more log-probabilities than one may hold."""
    if (found := num_tokens * (1 + (top or 0))) > MAX_LOGPROBS:
        message = (
            f"logprobs must ask for at most {MAX_LOGPROBS} log-probabilities in all (each token of "
            f"the answer has 1, and those of the likeliest), got at least {found}"
        )
        raise ApiError(message, param="logprobs")


def _prompts(prompt: Any) -> list[tuple[str, str | list[int]]]:
    """Where each prompt stands in the body, and the prompt: text or token ids."""
    match prompt:
        case str():
            return [("prompt", prompt)]
        case [int(), *_]:
            return [("prompt", convert(prompt, list[fields.Int], "prompt"))]
        case [str() | list(), *_] if len(prompt) > MAX_PROMPTS:
            message = f"prompt must hold at most {MAX_PROMPTS} prompts, got {len(prompt)}"
            raise ApiError(message, param="prompt")
        case [str(), *_]:
            texts = convert(prompt, list[str], "prompt")
            return [(f"prompt[{i}]", text) for i, text in enumerate(texts)]
        case [list(), *_]:
            lists = convert(prompt, list[list[fields.Int]], "prompt")
            return [(f"prompt[{i}]", ids) for i, ids in enumerate(lists)]
    kinds = "a string, token ids, or a list of strings or of token ids"
    raise ApiError(f"prompt must be {kinds}, got {shown(prompt)}", param="prompt")


def _max_completion_tokens(body: fields.ChatBody) -> tuple[str, int | None]:
    """The limit of the output under either of its names, and the name."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        message = (
            f"max_completion_tokens must equal max_tokens ({old}) when both are given, got {new}"
        )
        raise ApiError(message, param="max_completion_tokens")
    return ("max_tokens", old) if new is None else ("max_completion_tokens", new)


def _chat_logprobs(body: fields.ChatBody) -> int | None:
    top = body.top_logprobs
    if top and not body.logprobs:
        message = f"top_logprobs needs logprobs to be true, got top_logprobs {top}"
        raise ApiError(message, param="top_logprobs")
    if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        message = f"top_logprobs must be at least 0 and at most {MAX_TOP_LOGPROBS}, got {top}"
        raise ApiError(message, param="top_logprobs")
    return (top or 0) if body.logprobs else None


def _stream_options(body: fields.Sampling) -> fields.StreamOptions:
    given, kind = body.stream_options or {}, fields.StreamOptions
    options = read_object(given, kind, fields.NEUTRAL_STREAM, "stream_options.")
    if not body.stream and (options.include_usage or options.continuous_usage_stats):
        message = f"stream_options needs stream to be true, got {shown(given)}"
        raise ApiError(message, param="stream_options")
    return options


def _check_model(body: fields.Sampling, model: ServedModel) -> None:
    if body.model is not None and body.model != model.name:
        raise unknown_model(body.model, model.name)
    if body.priority and not model.has_priorities:
        message = f"priority needs a server with --schedule-policy priority, got {body.priority}"
        raise ApiError(message, param="priority")


def unknown_model(name: str, served: str) -> ApiError:
    message = f"The model {cut(name)!r} does not exist; {served!r} is served here"
    return ApiError(message, status=404, param="model", code="model_not_found")


def _params(
    body: fields.Sampling,
    model: ServedModel,
    structured: dict[str, Any] | None,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    given = {name: getattr(body, name) for name in _SHARED} | {"max_tokens": max_tokens}
    given["structured_outputs"] = structured
    try:
        params = SamplingParams(
            logit_bias=tuple(_logit_bias(body.logit_bias or {})),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **{name: value for name, value in given.items() if value is not None},
        )
    except (ValueError, TypeError) as error:
        message = str(error)  # names its field first
        names = SamplingParams.__struct_fields__
        param = next((word for word in re.findall(r"\w+", message) if word in names), None)
        if param == "max_tokens" and getattr(body, "max_completion_tokens", None) is not None:
            param = "max_completion_tokens"
            message = message.replace("max_tokens", param, 1)
        by = _structured_by(body)
        own = by if param == "structured_outputs" else param
        raise refused(message, by, param=own) from error
    _check_token_ids(params.stop_token_ids, "stop_token_ids", model)
    _check_token_ids([token_id for token_id, _ in params.logit_bias], "logit_bias", model)
    return params


def _structured_by(body: fields.Sampling) -> str:
    """The field that a grammar comes of, if there is one."""
    if body.structured_outputs is not None:
        return "structured_outputs"
    return "tools" if read_structured(body) is None else "response_format"


def _logit_bias(bias: dict[str, Any]) -> list[tuple[int, float]]:
    for name in bias:
        if not re.fullmatch(r"\d{1,9}", name):
            raise ApiError(
                f"logit_bias must be keyed by token ids, got {shown(name)}", param="logit_bias"
            )
    return [(int(name), value) for name, value in bias.items()]


@contextmanager
def _refuse(param: str, code: str | None = None) -> Iterator[None]:
    """Turns a ValueError of the engine's own checks into an answer that names the field."""
    try:
        yield
    except ValueError as error:
        raise ApiError(str(error), param=param, code=code) from error


def _check_token_ids(ids: Sequence[int], param: str, model: ServedModel) -> None:
    with _refuse(param):
        model.limits.check_token_ids(param, ids)


def _encode(
    text: str, param: str, model: ServedModel, *, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of a prompt; one that is too long is refused before most of it is encoded."""
    check = partial(model.limits.check_length, prompt=param, at_least="at least ")
    with _refuse(param, "context_length_exceeded"):
        return model.tokenizer.encode(text, add_special_tokens=add_special_tokens, check=check)


def _check_prompt(
    ids: list[int], param: str, params: SamplingParams, limit_name: str, model: ServedModel
) -> int:
    """How many tokens the output may have."""
    with _refuse(param, "context_length_exceeded" if ids else None):
        limit = model.limits.token_limit(len(ids), params, prompt=param, max_tokens=limit_name)
    _check_token_ids(ids, param, model)
    return limit - len(ids)


def _request(
    request_id: str,
    ids: list[int],
    params: SamplingParams,
    body: fields.Sampling,
    model: ServedModel,
) -> Request:
    salt, eos = body.cache_salt or "", model.tokenizer.eos_token_id
    params = params.with_a_seed()
    return Request(request_id, ids, params, body.priority or 0, salt, eos_token_id=eos)
