"""Bodies of /v1/chat/completions, OpenAI's chat API -> calls."""

import dataclasses
import uuid

from minisgl.server import fields
from minisgl.server.body import ApiError, decode, read_object
from minisgl.server.calls import (
    Call,
    Conversation,
    ServedModel,
    asked_logprobs,
    check_model,
    conversation_call,
    stream_options,
)
from minisgl.server.structured import read_structured
from minisgl.server.tools import read_messages, read_tools


def parse_chat(content: bytes, model: ServedModel) -> Call:
    """A body of /v1/chat/completions. Raises ApiError."""
    given = decode(content)
    uncalled = "none" in (given.get("tool_choice"), given.get("function_call"))
    neutral = fields.NEUTRAL_UNCALLED if uncalled else fields.NEUTRAL_CHAT
    body = read_object(given, fields.ChatBody, neutral)
    check_model(body, model)
    messages, tools = read_messages(body.messages), read_tools(body)
    limit, max_tokens = _max_completion_tokens(body)
    said = Conversation(
        where="messages",
        messages=messages,
        template_options=body.chat_template_kwargs or {},
        tools=tools,
        structure=read_structured(body),
        max_tokens=max_tokens,
        limit=limit,
        logprobs=asked_logprobs(body.top_logprobs, bool(body.logprobs), "logprobs to be true"),
    )
    call = conversation_call("chat", f"chatcmpl-{uuid.uuid4().hex}", said, body, model)
    return dataclasses.replace(call, stream_options=stream_options(body))


def _max_completion_tokens(body: fields.ChatBody) -> tuple[str, int | None]:
    """The limit of the output under either of its names, and the name."""
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        message = (
            f"max_completion_tokens must equal max_tokens ({old}) when both are given, got {new}"
        )
        raise ApiError(message, param="max_completion_tokens")
    return ("max_tokens", old) if new is None else ("max_completion_tokens", new)
