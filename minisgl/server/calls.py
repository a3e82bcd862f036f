"""What the bodies of every API become: a `Call` of valid requests. Invalid ones are answered 400.

Every field of a body is used, or refused by name. A field that is not supported may be sent with
a value that asks for nothing (`"tools": []`).
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from minisgl.core.executor import Limits
from minisgl.core.request import MAX_TOP_LOGPROBS, Request, SamplingParams
from minisgl.server import fields
from minisgl.server.answer import AnswerForm, ReasoningFormat
from minisgl.server.body import ApiError, cut, read_object, shown
from minisgl.server.chat_template import marked
from minisgl.server.echo import Echo
from minisgl.server.structured import Structure, refused
from minisgl.server.tokenizer import Tokenizer
from minisgl.server.tool_formats import ToolFormat
from minisgl.server.tools import Tools, answer_form, held_to

MAX_LOGPROBS = 2**20  # in one answer that is not streamed, or echoed: 30 MB, of a chat 80 MB
MAX_TEMPLATE_WORDS = 200  # characters of a template's refusal, which may repeat a message

Kind = Literal["chat", "completion", "response"]


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
    kind: Kind
    model: str
    requests: list[Request]
    stream: bool
    stream_options: fields.StreamOptions = field(default_factory=fields.StreamOptions)
    echo: list[Echo] | None = None  # per request, where it is wanted
    form: AnswerForm = field(default_factory=AnswerForm)
    structured_by: str | None = None  # the body's field that asks for structured output
    warnings: list[str] = field(default_factory=list)  # of that; filled in when the engine says so
    repeated: dict[str, Any] = field(default_factory=dict)  # what an answer repeats of its body
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def params(self) -> SamplingParams:
        """Equal for all requests but for the seed and for a max_tokens that the body left out."""
        return self.requests[0].params


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """A body that asks how a conversation goes on, as every API for it says so."""

    where: str  # the field that holds the messages
    messages: list[dict[str, Any]]  # as a chat template gets them
    template_options: dict[str, Any]
    tools: Tools
    structure: Structure | None
    max_tokens: int | None
    limit: str  # the field that says so
    logprobs: int | None


# Fields that a body and `SamplingParams` have alike; the others need converting.
_SHARED = {*fields.Choices.__struct_fields__} & {*SamplingParams.__struct_fields__}
_SHARED -= {"logit_bias", "structured_outputs"}
_RENDER_OPTIONS = {"messages", "tools", "documents", "add_generation_prompt"}


def conversation_call(
    kind: Kind, call_id: str, said: Conversation, body: fields.Sampling, model: ServedModel
) -> Call:
    """The call of one request that goes on with a conversation. Raises ApiError."""
    where, structure = said.where, said.structure
    for name in sorted(_RENDER_OPTIONS & said.template_options.keys()):
        param = f"chat_template_kwargs.{name}"
        raise ApiError(f"{param} is not supported", param=param)
    tools, options = said.tools.for_template() or None, said.template_options
    try:
        text, frame = model.tokenizer.render_both(said.messages, tools=tools, **options)
    except ValueError as error:
        raise ApiError(cut(str(error), MAX_TEMPLATE_WORDS), param=where) from error
    calls = [call for each in said.messages for call in each.get("tool_calls", ())]
    for name in (call["function"]["name"] for call in calls):
        if marked(name) not in frame:
            message = f"{where}: earlier calls of {shown(name)} are left out by this model's chat "
            message += "template; a server with --chat-template FILE uses another"
            raise ApiError(message, param=where)
    form = answer_form(said.tools, frame, model.tool_format, model.reasoning)
    prompt = encode(text, where, model, add_special_tokens=False)
    ends_freely = not (body.ignore_eos or body.min_tokens)
    asked, form = held_to(form, said.tools, structure, model.tokenizer, ends_freely=ends_freely)
    by = "tools" if structure is None else structure.by
    params = sampling_params(
        body, model, asked, by, limit=(said.limit, said.max_tokens), logprobs=said.logprobs
    )
    check_prompt(prompt, where, params, said.limit, model)
    return Call(
        id=call_id,
        kind=kind,
        model=model.name,
        requests=[make_request(call_id, prompt, params, body, model)],
        stream=bool(body.stream),
        form=form,
        structured_by=by if params.structured_outputs else None,
    )


def check_answer(num_tokens: int, top: int | None, kind: Kind) -> None:
    """Refuses an answer with more log-probabilities than one may hold."""
    if (found := num_tokens * (1 + (top or 0))) > MAX_LOGPROBS:
        name = "logprobs"
        if kind == "response":
            name = "top_logprobs" if top else "include"
        message = (
            f"{name} must ask for at most {MAX_LOGPROBS} log-probabilities in all (each token of "
            f"the answer has 1, and those of the likeliest), got at least {found}"
        )
        raise ApiError(message, param=name)


def asked_logprobs(top: int | None, is_asked: bool, needs: str) -> int | None:
    """How many of the likeliest tokens to tell, where log-probabilities are asked for."""
    if top and not is_asked:
        message = f"top_logprobs needs {needs}, got top_logprobs {top}"
        raise ApiError(message, param="top_logprobs")
    if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        message = f"top_logprobs must be at least 0 and at most {MAX_TOP_LOGPROBS}, got {top}"
        raise ApiError(message, param="top_logprobs")
    return (top or 0) if is_asked else None


def stream_options(body: fields.Choices) -> fields.StreamOptions:
    given, kind = body.stream_options or {}, fields.StreamOptions
    options = read_object(given, kind, fields.NEUTRAL_STREAM, "stream_options.")
    if not body.stream and (options.include_usage or options.continuous_usage_stats):
        message = f"stream_options needs stream to be true, got {shown(given)}"
        raise ApiError(message, param="stream_options")
    return options


def check_model(body: fields.Sampling, model: ServedModel) -> None:
    if body.model is not None and body.model != model.name:
        raise unknown_model(body.model, model.name)
    if body.priority and not model.has_priorities:
        message = f"priority needs a server with --schedule-policy priority, got {body.priority}"
        raise ApiError(message, param="priority")


def unknown_model(name: str, served: str) -> ApiError:
    message = f"The model {cut(name)!r} does not exist; {served!r} is served here"
    return ApiError(message, status=404, param="model", code="model_not_found")


def sampling_params(
    body: fields.Sampling,
    model: ServedModel,
    structured: dict[str, Any] | None,
    structured_by: str,
    *,
    limit: tuple[str, int | None],
    logprobs: int | None,
    prompt_logprobs: int | None = None,
) -> SamplingParams:
    """What the body asks of sampling; `limit` is that of the output, behind its name there."""
    given = {name: getattr(body, name, None) for name in _SHARED} | {"max_tokens": limit[1]}
    given["structured_outputs"] = structured
    try:
        params = SamplingParams(
            logit_bias=tuple(_logit_bias(body.logit_bias or {})),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            **{name: value for name, value in given.items() if value is not None},
        )
    except (ValueError, TypeError) as error:
        message = str(error).replace("max_tokens", limit[0])  # names its field first
        names = {*SamplingParams.__struct_fields__, limit[0]}
        param = next((word for word in re.findall(r"\w+", message) if word in names), None)
        own = structured_by if param == "structured_outputs" else param
        raise refused(message, structured_by, param=own) from error
    _check_token_ids(params.stop_token_ids, "stop_token_ids", model)
    _check_token_ids([token_id for token_id, _ in params.logit_bias], "logit_bias", model)
    return params


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


def encode(
    text: str, param: str, model: ServedModel, *, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of a prompt; one that is too long is refused before most of it is encoded."""
    check = partial(model.limits.check_length, prompt=param, at_least="at least ")
    with _refuse(param, "context_length_exceeded"):
        return model.tokenizer.encode(text, add_special_tokens=add_special_tokens, check=check)


def check_prompt(
    ids: list[int], param: str, params: SamplingParams, limit_name: str, model: ServedModel
) -> int:
    """How many tokens the output may have."""
    with _refuse(param, "context_length_exceeded" if ids else None):
        limit = model.limits.token_limit(len(ids), params, prompt=param, max_tokens=limit_name)
    _check_token_ids(ids, param, model)
    return limit - len(ids)


def make_request(
    request_id: str,
    ids: list[int],
    params: SamplingParams,
    body: fields.Sampling,
    model: ServedModel,
) -> Request:
    salt, eos = body.cache_salt or "", model.tokenizer.eos_token_id
    params = params.with_a_seed()
    return Request(request_id, ids, params, body.priority or 0, salt, eos_token_id=eos)
