"""The fields of OpenAI's bodies: those that are honoured, and those that may ask for nothing."""

from typing import Annotated, Any, Literal

import msgspec

from minisgl.server.body import Neutral
from minisgl.server.tool_formats import TOOL_NAME

# What the engine keeps in 32 bits; beyond it no value could mean anything.
Int = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]

ToolName = Annotated[str, msgspec.Meta(pattern=rf"\A{TOOL_NAME.pattern}\Z")]


class Empty(msgspec.Struct):
    """An object none of whose fields is honoured."""


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None  # at the end
    continuous_usage_stats: bool | None = None  # in each chunk


class Sampling(msgspec.Struct, kw_only=True):
    """The fields that all bodies share."""

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    # of OpenAI's for chat and completions, beside which these are extras
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    seed: int | None = None
    # extras
    structured_outputs: dict[str, Any] | None = None
    top_k: Int | None = None
    min_p: float | None = None
    min_tokens: Int | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[Int] | None = None
    ignore_eos: bool | None = None
    priority: Int | None = None
    cache_salt: str | None = None


class Choices(Sampling, kw_only=True):
    """The fields that chat and completions share."""

    max_tokens: Int | None = None
    n: Int | None = None
    response_format: dict[str, Any] | None = None


class ChatBody(Choices, kw_only=True):
    messages: list[dict[str, Any]]
    max_completion_tokens: Int | None = None
    logprobs: bool | None = None
    top_logprobs: Int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None


class CompletionBody(Choices, kw_only=True):
    prompt: Any
    logprobs: Int | None = None
    echo: bool | None = None
    best_of: Int | None = None


class TextPart(msgspec.Struct):
    text: str
    type: Literal["text"]


class MessageBody(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class Tool(msgspec.Struct):
    type: Literal["function"]
    function: dict[str, Any]


class Function(msgspec.Struct):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Chosen(msgspec.Struct):
    name: str


class ToolCall(msgspec.Struct):
    id: str
    type: Literal["function"]
    function: dict[str, Any]


class CalledFunction(msgspec.Struct):
    name: ToolName
    arguments: str


# Labels for the caller's own bookkeeping; they could not change the answer.
_LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
_NEUTRAL: Neutral = {**dict.fromkeys(_LABELS), "service_tier": ("auto", "default")}
NEUTRAL_COMPLETION: Neutral = {**_NEUTRAL, "suffix": ("",)}
NEUTRAL_CHAT: Neutral = {
    **_NEUTRAL,
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "store": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# With a `tool_choice` (or the older `function_call`) of "none" nothing is called.
NEUTRAL_UNCALLED: Neutral = {**NEUTRAL_CHAT, "functions": None}
NEUTRAL_STREAM: Neutral = {"include_obfuscation": (False,)}
# What `cache_control` asks for is done for every prompt: its beginning is cached.
NEUTRAL_PART: Neutral = {"annotations": ([],), "cache_control": None}
NEUTRAL_MESSAGE: Neutral = {
    **NEUTRAL_PART,
    "audio": (),
    "function_call": (),
    "refusal": (),
}
NEUTRAL_TOOL: Neutral = {"cache_control": None}
NEUTRAL_TOOL_CALL: Neutral = {"index": None}  # a streamed call has one
