"""What both forms of the offline API share: prompts become requests, deltas become outputs."""

import contextlib
import itertools
import operator
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from reprlib import repr as shown  # cut where it is long
from typing import Any, NoReturn, cast

from minisgl.core.request import Delta, FinishReason, Request, SamplingParams, TokenLogprobs
from minisgl.engine.messages import EngineInfo
from minisgl.server.chat_template import marked
from minisgl.server.text import TextStream
from minisgl.server.tokenizer import Tokenizer

Prompt = str | Sequence[int]
Params = SamplingParams | Sequence[SamplingParams] | None
Conversation = Sequence[Mapping[str, Any]]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")


@dataclass
class CompletionOutput:
    """One choice. `token_ids` include the token that ended it; `text` has no stop and no marks.

    `stop_reason` is the stop string or the token id (EOS included) that ended it, if one did.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprobs] | None = None  # one per token, where asked for


@dataclass
class RequestOutput:
    """What came of one prompt. Times are seconds since the request was handed to the engine."""

    prompt: str | None  # None where token ids were given
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs] | None = None  # for every prompt token but the first
    num_cached_tokens: int = 0  # of the prompt, found in the radix cache
    warnings: list[str] = field(default_factory=list)  # of structured_outputs that are not strict
    ttft: float = 0.0  # until the first token of any choice
    e2e: float = 0.0  # until the last token of the last choice

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        """Token ids of the first choice."""
        return self.outputs[0].token_ids


class Collector:
    """Turns the deltas of one request into its `RequestOutput`."""

    def __init__(self, request: Request, prompt: str | None, tokenizer: Tokenizer) -> None:
        params = request.params
        self.request = request
        outputs = [CompletionOutput(i) for i in range(params.n)]
        scored: list[TokenLogprobs] | None = None if params.prompt_logprobs is None else []
        self.output = RequestOutput(prompt, request.prompt_token_ids, outputs, scored)
        self.fresh: deque[str] = deque()  # text of the first choice, not yielded yet
        self._streams = [TextStream(tokenizer, params) for _ in range(params.n)]
        self.running = params.n  # choices
        self._error: Exception | None = None
        self._start = time.perf_counter()

    def take(self, delta: Delta) -> bool:
        """Add a delta. True when a stop string ended a choice that the engine still runs."""
        if delta.error is not None:
            kind = ValueError if delta.refused else RuntimeError
            self._error = kind(f"request {self.request.id} failed: {delta.error}")
            self.running = 0
            return False
        self.output.warnings += delta.warnings or ()
        stream, choice = self._streams[delta.choice], self.output.outputs[delta.choice]
        if stream.finish_reason is not None:
            return False
        piece = stream.feed(delta)
        self.output.e2e = time.perf_counter() - self._start
        if piece.token_ids and not self.output.ttft:
            self.output.ttft = self.output.e2e
        choice.text += piece.text
        choice.token_ids += piece.token_ids
        if self.request.params.logprobs is not None:
            choice.logprobs = choice.logprobs or []
            choice.logprobs += piece.logprobs
        if delta.choice == 0:  # the others find the prompt that the first one computed
            self.output.num_cached_tokens = delta.num_cached_tokens
            if self.output.prompt_logprobs is not None:
                self.output.prompt_logprobs += delta.prompt_logprobs or ()
            if piece.text:
                self.fresh.append(piece.text)
        if piece.finish_reason is None:
            return False
        choice.finish_reason = piece.finish_reason
        choice.stop_reason = stream.stop_string or delta.stop_token_id
        self.running -= 1
        return delta.finish_reason is None

    def result(self) -> RequestOutput:
        """What came of the request. Raises RuntimeError, saying why, when it failed, or ValueError
        where that was by its own fault."""
        if self._error is not None:
            raise self._error
        return self.output


class NoTokenizer(Tokenizer):
    """For a model without a tokenizer: token ids go in and come out, text does not."""

    eos_token_id = None

    def __init__(self, directory: str) -> None:
        self._directory = directory

    def encode(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(f"{self._directory} has no tokenizer: prompts must be token ids")

    render_chat = render_both = encode

    def is_special(self, token_id: int) -> bool:
        return True


def load_tokenizer(info: EngineInfo, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of the engine's model, or what stands in for it where there is none."""
    directory = Path(info.model_path)
    if directory.is_file() or any((directory / name).is_file() for name in TOKENIZER_FILES):
        return Tokenizer.from_directory(directory, chat_template)
    return NoTokenizer(info.model_path)


class PromptReader:
    """Makes requests of prompts and conversations; counts their ids."""

    def __init__(self, info: EngineInfo, chat_template: str | None) -> None:
        self.tokenizer = load_tokenizer(info, chat_template)
        self._check = partial(info.limits.check_length, at_least="at least ")
        self._ids = itertools.count()

    def chat_prompts(
        self, messages: Conversation | Sequence[Conversation], options: Mapping[str, Any]
    ) -> tuple[list[list[int]], bool]:
        """The conversations as token ids, and whether there was but one: a list of messages."""
        if not _is_list(messages):
            raise TypeError(f"messages must be a list of messages, got {shown(messages)}")
        single = not messages or isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Conversation], [messages] if single else messages)
        names = _tool_names(options.get("tools") or ())
        both = [self.tokenizer.render_both(each, **options) for each in conversations]
        for index, name in enumerate(names):
            if not all(marked(name) in frame for _, frame in both):
                wrong = f"tools[{index}], {shown(name)}, is left out by this model's chat template"
                raise ValueError(wrong)
        encode = partial(self.tokenizer.encode, add_special_tokens=False, check=self._check)
        return [encode(text) for text, _ in both], single

    def collector(self, prompt: Prompt, params: SamplingParams) -> Collector:
        if isinstance(prompt, str):
            text, token_ids = prompt, self.tokenizer.encode(prompt, check=self._check)
        else:
            text, token_ids = None, _token_ids(prompt)
        if params.stop and isinstance(self.tokenizer, NoTokenizer):
            raise ValueError(f"stop needs a tokenizer, and the model has none: {params.stop!r}")
        name, eos = f"offline-{next(self._ids)}", self.tokenizer.eos_token_id
        request = Request(name, token_ids, params.with_a_seed(), eos_token_id=eos)
        return Collector(request, text, self.tokenizer)


def each_params(params: Params, count: int) -> Iterator[SamplingParams]:
    """One SamplingParams per prompt. Raises ValueError when there are more or fewer."""
    if params is None or isinstance(params, SamplingParams):
        return itertools.repeat(params or SamplingParams(), count)
    if not (_is_list(params) and all(isinstance(each, SamplingParams) for each in params)):
        raise TypeError(f"sampling_params must be SamplingParams or a list, got {shown(params)}")
    if len(params) != count:
        raise ValueError(
            f"sampling_params must be one, or one per prompt: {len(params)} for {count} prompts"
        )
    return iter(params)


def as_list(prompts: Prompt | Sequence[Prompt]) -> tuple[Sequence[Prompt], bool]:
    """The prompts as a list, and whether there was but one: a string, or a list of token ids."""
    if not isinstance(prompts, str) and not _is_list(prompts):
        raise TypeError(f"prompts must be strings or token ids, got {shown(prompts)}")
    single = isinstance(prompts, str) or (len(prompts) > 0 and _is_scalar(prompts[0]))
    return cast(Sequence[Prompt], [prompts] if single else prompts), single


def one_choice(params: SamplingParams | None) -> SamplingParams:
    (params,) = each_params(params, 1)
    if params.n != 1:
        raise ValueError(f"n must be 1 where text is streamed, got {params.n}")
    return params


def _tool_names(tools: Any) -> list[str]:
    if not _is_list(tools):
        raise TypeError(f"tools must be a list of tools, got {shown(tools)}")
    names = []
    for index, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not name:
            raise ValueError(f"tools[{index}] must be an object with a name, got {shown(tool)}")
        names.append(name)
    return names


def _token_ids(prompt: Sequence[int]) -> list[int]:
    if _is_list(prompt) and bool not in map(type, prompt):
        with contextlib.suppress(TypeError):
            return list(map(operator.index, prompt))
    raise TypeError(f"a prompt must be a string or token ids, got {shown(prompt)}")


def _is_list(given: object) -> bool:
    """Whether it is a list, a tuple, an array or their like."""
    is_list = isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray)
    return is_list or getattr(given, "ndim", 0) > 0


def _is_scalar(given: object) -> bool:
    return not isinstance(given, Sized) or getattr(given, "ndim", 1) == 0
