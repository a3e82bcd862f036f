"""Bodies of /v1/completions, OpenAI's older API -> calls."""

import uuid
from typing import Any

import msgspec

from minisgl.server import fields
from minisgl.server.body import ApiError, convert, read, shown
from minisgl.server.calls import (
    Call,
    ServedModel,
    check_answer,
    check_model,
    check_prompt,
    encode,
    make_request,
    sampling_params,
    stream_options,
)
from minisgl.server.echo import Echo
from minisgl.server.structured import read_structured

MAX_PROMPTS = 1024  # in one completions body
MAX_CHOICES = 1024  # in one answer
COMPLETION_TOKENS = 16  # max_tokens of a body that names none: OpenAI's


def parse_completion(content: bytes, model: ServedModel) -> Call:
    """A body of /v1/completions. Raises ApiError."""
    body = read(content, fields.CompletionBody, fields.NEUTRAL_COMPLETION)
    check_model(body, model)
    if body.best_of is not None and body.best_of != (body.n or 1):
        message = f"best_of must equal n ({body.n or 1}): nothing is ranked; got {body.best_of}"
        raise ApiError(message, param="best_of")
    echo_logprobs = body.logprobs if body.echo else None
    if echo_logprobs is not None and (body.n or 1) > 1:
        raise ApiError(f"echo with logprobs needs n = 1, got {body.n}", param="echo")
    asked, by = read_structured(body) or (None, "structured_outputs")
    params = sampling_params(
        body,
        model,
        asked,
        by,
        limit=("max_tokens", body.max_tokens),
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
        ids = encode(prompt, param, model) if isinstance(prompt, str) else prompt
        room = check_prompt(ids, param, params, "max_tokens", model)
        limit = body.max_tokens or min(room, max(COMPLETION_TOKENS, params.min_tokens))
        own = msgspec.structs.replace(params, max_tokens=limit)
        requests.append(make_request(f"{call_id}-{index}", ids, own, body, model))
        if echo_logprobs is not None:
            num_echoed += len(ids)
            check_answer(num_echoed, echo_logprobs, "completion")
        if body.echo:
            echoes.append(Echo.of(prompt, ids, model.tokenizer, echo_logprobs is not None))
    return Call(
        id=call_id,
        kind="completion",
        model=model.name,
        requests=requests,
        stream=bool(body.stream),
        stream_options=stream_options(body),
        echo=echoes or None,
        structured_by=by if asked else None,
    )


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
