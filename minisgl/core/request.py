"""What a user asks (`Request`, `SamplingParams`) and what comes back for it (`Delta`)."""

import secrets
from collections.abc import Mapping
from reprlib import repr as shown  # cut where it is long
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 512  # entries
MAX_STOP_TOKEN_IDS = 256
MAX_SEED = 2**64 - 1
LEAST_TEMPERATURE = 1e-5  # that is not greedy: logits divided by less overflow in fp32
MAX_INT = 2**31 - 1  # what the device keeps counts in


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """How the tokens of one request are drawn. Validated on construction, immutable afterwards.

    `max_tokens=None` means up to the end of the context (or of the KV pool). `top_k=0` and
    `top_p=1.0` switch those filters off; `temperature=0` is greedy, and what is below
    LEAST_TEMPERATURE counts as 0. `logprobs=k` asks for the chosen token's log-probability and the
    k most likely ones; `prompt_logprobs` likewise for the prompt. `stop` strings end the text where
    they begin and are not part of it. `seed=None` is replaced by a random 64-bit seed where the
    request enters the engine (`with_a_seed`). One string will do for `stop`, a mapping for
    `logit_bias`, and None for either and for `stop_token_ids`.

    Raises ValueError naming the field, its limit and the value given; TypeError where a value is
    not of the field's type.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind, convert in (
            ("stop", "a string or a list", lambda s: (s,) if isinstance(s, str) else tuple(s)),
            ("stop_token_ids", "a list", tuple),
            ("logit_bias", "a mapping or pairs", _as_pairs),
        ):
            given = getattr(self, name)
            try:
                value = () if given is None else convert(given)
            except (TypeError, ValueError) as error:
                raise TypeError(f"{name} must be {kind}, got {shown(given)}") from error
            msgspec.structs.force_setattr(self, name, value)
        _check_types(self)
        _require("max_tokens", self.max_tokens, low=1, high=MAX_INT)
        _require("min_tokens", self.min_tokens, low=0, high=MAX_INT)
        _require("temperature", self.temperature, low=0.0, high=100.0)
        if self.temperature < LEAST_TEMPERATURE:
            msgspec.structs.force_setattr(self, "temperature", 0.0)
        _require("top_k", self.top_k, low=0, high=MAX_INT)
        _require("top_p", self.top_p, low=0.0, high=1.0, open_low=True)
        _require("min_p", self.min_p, low=0.0, high=1.0)
        _require("repetition_penalty", self.repetition_penalty, low=0.0, high=100.0, open_low=True)
        _require("presence_penalty", self.presence_penalty, low=-2.0, high=2.0)
        _require("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0)
        _require("logprobs", self.logprobs, low=0, high=MAX_TOP_LOGPROBS)
        _require("prompt_logprobs", self.prompt_logprobs, low=0, high=MAX_TOP_LOGPROBS)
        _require("n", self.n, low=1, high=128)
        _require("seed", self.seed, low=0, high=MAX_SEED)
        _require("number of logit_bias entries", len(self.logit_bias), high=MAX_LOGIT_BIAS)
        _require("number of stop_token_ids", len(self.stop_token_ids), high=MAX_STOP_TOKEN_IDS)
        for token_id, bias in self.logit_bias:
            _require("logit_bias token id", token_id, low=0)
            _require("logit_bias", bias, low=-100.0, high=100.0)
        for token_id in self.stop_token_ids:
            _require("stop_token_ids", token_id, low=0)
        if any(not text for text in self.stop):
            raise ValueError("stop must not contain an empty string")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )

    def with_a_seed(self) -> "SamplingParams":
        """These, with a random seed where there is none."""
        if self.seed is not None:
            return self
        return msgspec.structs.replace(self, seed=secrets.randbits(MAX_SEED.bit_length()))

    @property
    def needs_counts(self) -> bool:
        """Whether sampling reads how often each token has occurred."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


class Request(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One user request in tokens. With `params.n > 1` it yields that many sequences."""

    id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0  # higher runs earlier under the `priority` policy
    cache_salt: str = ""  # prefixes are shared only between equal salts
    grammar: str | None = None  # specification of a grammar, read by the grammar backend
    eos_token_id: int | None = None  # the tokenizer's, which ends a text as the model's own do


class TokenLogprobs(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Log-probabilities (natural log) at one position: the token's own, and the top ones."""

    token_id: int
    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class Delta(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What is new of one choice of one request: tokens, and possibly its end.

    `finish_reason` is None while the choice runs. `stop_token_id` names the token that ended it;
    that token is the last of `token_ids`. `prompt_logprobs` come once, with the first tokens, and
    hold one entry per prompt token but the first. `error` says why when the reason is "error".
    Accepted drafts are among `token_ids`, rejected ones are not.
    """

    request_id: str
    choice: int
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached_tokens: int = 0
    error: str | None = None
    num_accepted_drafts: int = 0
    num_rejected_drafts: int = 0


def _as_pairs(bias: object) -> tuple[tuple[int, float], ...]:
    items = bias.items() if isinstance(bias, Mapping) else bias
    return tuple((token_id, value) for token_id, value in items)  # type: ignore[attr-defined]


def _check_types(params: SamplingParams) -> None:
    """One field after another, as its annotation says; a bool is no number here."""
    for name in _INTEGERS:
        value = getattr(params, name)
        if value is not None and type(value) is not int:
            raise TypeError(f"{name} must be an int, got {shown(value)}")
    for name in _FLOATS:
        value = getattr(params, name)
        if type(value) not in (int, float):
            raise TypeError(f"{name} must be a number, got {shown(value)}")
    for text in params.stop:
        if type(text) is not str:
            raise TypeError(f"stop must hold strings, got {shown(text)}")
    for token_id in params.stop_token_ids:
        if type(token_id) is not int:
            raise TypeError(f"stop_token_ids must hold ints, got {shown(token_id)}")
    for token_id, bias in params.logit_bias:
        if type(token_id) is not int or type(bias) not in (int, float):
            raise TypeError(
                f"logit_bias must map ints to numbers, got {shown(token_id)}: {shown(bias)}"
            )
    if type(params.ignore_eos) is not bool:
        raise TypeError(f"ignore_eos must be a bool, got {shown(params.ignore_eos)}")


_TYPES = SamplingParams.__annotations__
_INTEGERS = [name for name, kind in _TYPES.items() if kind in (int, int | None)]
_FLOATS = [name for name, kind in _TYPES.items() if kind is float]


def _require(
    field: str,
    value: float | None,
    *,
    low: float = 0,
    high: float | None = None,
    open_low: bool = False,
) -> None:
    if value is None:
        return
    above = value > low if open_low else value >= low
    if above and (high is None or value <= high):
        return
    bound = f"{'greater than' if open_low else 'at least'} {low}"
    if high is not None:
        bound += f" and at most {high}"
    raise ValueError(f"{field} must be {bound}, got {shown(value)}")
