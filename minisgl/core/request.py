"""What a user asks (`Request`, `SamplingParams`) and what comes back for it (`Delta`)."""

import secrets
from collections.abc import Mapping
from reprlib import repr as shown  # cut where it is long
from typing import Annotated, Any, Literal, get_args

import msgspec

from minisgl.config import MAX_GRAMMAR_BYTES

FinishReason = Literal["stop", "length", "abort", "error"]

MAX_TOP_LOGPROBS = 20
MAX_LOGIT_BIAS = 512  # entries
MAX_STOP_STRINGS = 64
MAX_STOP_TOKEN_IDS = 256
MAX_SEED = 2**64 - 1
LEAST_TEMPERATURE = 1e-5  # that is not greedy: logits divided by less overflow in fp32
MAX_INT = 2**31 - 1  # what the device keeps counts in
# What holds where neither a request nor its model says anything: OpenAI's defaults.
NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, gc=False, array_like=True):
    """How the tokens of one request are drawn. Validated on construction, immutable afterwards.

    `temperature`, `top_k`, `top_p`, `min_p` and `repetition_penalty` that are None are what the
    model recommends (`completed`). `max_tokens=None` means up to the end of the context (or of the
    KV pool). `top_k=0` (or -1) and `top_p=1.0` switch those filters off; `temperature=0` is greedy,
    and what is below LEAST_TEMPERATURE counts as 0. `logprobs=k` asks for the chosen token's
    log-probability and the k most likely ones; `prompt_logprobs` likewise for the prompt. `stop`
    strings end the text where they begin and are not part of it. `seed=None` is replaced by a
    random 64-bit seed where the request enters the engine (`with_a_seed`); negative ones are 64
    bits with a sign, as OpenAI's. One string will do for `stop`, a mapping for `logit_bias`, and
    None for either and for `stop_token_ids`. Numbers are within the ranges beside them.

    `structured_outputs` holds the text to a form: {"json": schema}, {"json_object": True},
    {"regex": ...}, {"grammar": ...} or {"choice": [...]}, kept as JSON. A "strict": False beside
    "json" allows what of the schema is not supported to be left out, with a warning.

    Raises ValueError naming the field, its limit and the value given; TypeError where a value is
    not of the field's type.
    """

    max_tokens: Annotated[int | None, (1, MAX_INT)] = None
    min_tokens: Annotated[int, (0, MAX_INT)] = 0
    temperature: Annotated[float | None, (0.0, 100.0)] = None
    top_k: Annotated[int | None, (-1, MAX_INT)] = None
    top_p: Annotated[float | None, (0.0, 1.0)] = None  # but not 0, which would leave no token
    min_p: Annotated[float | None, (0.0, 1.0)] = None
    repetition_penalty: Annotated[float | None, (0.01, 100.0)] = None
    presence_penalty: Annotated[float, (-2.0, 2.0)] = 0.0
    frequency_penalty: Annotated[float, (-2.0, 2.0)] = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: Annotated[int | None, (0, MAX_TOP_LOGPROBS)] = None
    prompt_logprobs: Annotated[int | None, (0, MAX_TOP_LOGPROBS)] = None
    n: Annotated[int, (1, 128)] = 1
    structured_outputs: str | None = None
    seed: Annotated[int | None, (-(2**63), MAX_SEED)] = None

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
        if self.structured_outputs is not None:
            text = _structured_outputs(self)
            msgspec.structs.force_setattr(self, "structured_outputs", text)
        for name, (low, high) in RANGES.items():
            _require(name, getattr(self, name), low, high, open_low=name == "top_p")
        if self.temperature is not None and self.temperature < LEAST_TEMPERATURE:
            msgspec.structs.force_setattr(self, "temperature", 0.0)
        if self.top_k == -1:
            msgspec.structs.force_setattr(self, "top_k", 0)
        if self.seed is not None:  # the same bits, without a sign
            msgspec.structs.force_setattr(self, "seed", self.seed & MAX_SEED)
        _require("number of logit_bias entries", len(self.logit_bias), 0, MAX_LOGIT_BIAS)
        _require("number of stop strings", len(self.stop), 0, MAX_STOP_STRINGS)
        _require("number of stop_token_ids", len(self.stop_token_ids), 0, MAX_STOP_TOKEN_IDS)
        for token_id, bias in self.logit_bias:
            _require("logit_bias token id", token_id, 0, MAX_INT)
            _require("logit_bias", bias, -100.0, 100.0)
        for token_id in self.stop_token_ids:
            _require("stop_token_ids", token_id, 0, MAX_INT)
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

    def completed(self, defaults: Mapping[str, float] = NEUTRAL) -> "SamplingParams":
        """These, with `defaults` where they say nothing."""
        unsaid = {name: defaults[name] for name in defaults if getattr(self, name) is None}
        return msgspec.structs.replace(self, **unsaid) if unsaid else self

    @property
    def needs_counts(self) -> bool:
        """Whether sampling reads how often each token has occurred."""
        return (
            self.repetition_penalty not in (None, 1.0)
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
    that token is the last of `token_ids`. `prompt_logprobs` come in deltas without tokens, as the
    prompt is computed: one entry for each prompt token but the first, in order. `error` says why
    when the reason is "error", and `refused` that it was by fault of the request. `warnings` come
    once, first and without tokens: what of its structured output is not kept. Accepted drafts are
    among `token_ids`, rejected ones are not.
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
    refused: bool = False
    warnings: list[str] | None = None


def _as_pairs(bias: object) -> tuple[tuple[int, float], ...]:
    items = bias.items() if isinstance(bias, Mapping) else bias
    return tuple((token_id, value) for token_id, value in items)  # type: ignore[attr-defined]


def _check_types(params: SamplingParams) -> None:
    """One field after another, as its annotation says; a bool is no number here."""
    for name, types in _TYPES.items():
        value = getattr(params, name)
        if type(value) not in (int, *types):
            kind = "a number" if float in types else "an int"
            raise TypeError(f"{name} must be {kind}, got {shown(value)}")
    for name, item, kind in (("stop", str, "strings"), ("stop_token_ids", int, "ints")):
        for value in getattr(params, name):
            if type(value) is not item:
                raise TypeError(f"{name} must hold {kind}, got {shown(value)}")
    for token_id, bias in params.logit_bias:
        if type(token_id) is not int or type(bias) not in (int, float):
            raise TypeError(
                f"logit_bias must map ints to numbers, got {shown(token_id)}: {shown(bias)}"
            )
    if type(params.ignore_eos) is not bool:
        raise TypeError(f"ignore_eos must be a bool, got {shown(params.ignore_eos)}")


# Kind of structured output -> the types it may have, and their names in JSON.
_JSON_NAMES = {dict: "object", bool: "boolean", str: "string", list: "array"}
STRUCTURES: dict[str, tuple[type, ...]] = {
    "json": (dict, bool, str),
    "json_object": (bool,),
    "regex": (str,),
    "grammar": (str,),
    "choice": (list,),
}


def _structured_outputs(params: SamplingParams) -> str:
    """Those of `params` as JSON. Raises ValueError or TypeError, naming the field."""
    name, given = "structured_outputs", params.structured_outputs
    try:
        made = msgspec.json.decode(given if isinstance(given, str) else msgspec.json.encode(given))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{name} cannot be read as JSON: {error}") from error
    text = msgspec.json.encode(checked_structure(made))
    _require(f"number of bytes of {name}", len(text), 0, MAX_GRAMMAR_BYTES)
    for field, value in (("min_tokens", params.min_tokens), ("ignore_eos", params.ignore_eos)):
        if value:
            raise ValueError(
                f"{field} cannot be given with structured_outputs, which say where the text may "
                f"end: got {value}"
            )
    return text.decode()


def checked_structure(given: object) -> dict[str, Any]:
    """`structured_outputs` of one kind, without nulls. Raises ValueError or TypeError."""
    name = "structured_outputs"
    if not isinstance(given, dict):
        raise TypeError(f"{name} must be an object, got {shown(given)}")
    made = {key: value for key, value in given.items() if value is not None}
    kinds = made.keys() - {"strict"}
    if len(kinds) != 1 or not kinds < STRUCTURES.keys():
        raise ValueError(f"{name} must hold one of {list(STRUCTURES)}, got {sorted(made)}")
    (kind,) = kinds
    if kind == "json_object" and made[kind] is False:
        raise ValueError(f"{name}.json_object must be true where it is given, got false")
    if type(made[kind]) not in STRUCTURES[kind]:
        types = " or ".join(_JSON_NAMES[each] for each in STRUCTURES[kind])
        raise TypeError(f"{name}.{kind} must be of type {types}, got {shown(made[kind])}")
    if "strict" in made and (kind != "json" or type(made["strict"]) is not bool):
        found = f"{shown(made['strict'])} beside {kind}"
        raise ValueError(f"{name}.strict must be a boolean, and goes with json alone, got {found}")
    return made


# Number -> the types it may have, and the least and the most it may be.
_ANNOTATIONS = SamplingParams.__annotations__.items()
_NUMBERS = {name: get_args(kind) for name, kind in _ANNOTATIONS if hasattr(kind, "__metadata__")}
_TYPES = {name: get_args(kind) or (kind,) for name, (kind, _) in _NUMBERS.items()}
RANGES: dict[str, tuple[float, float]] = {name: ends for name, (_, ends) in _NUMBERS.items()}


def _require(
    field: str, value: float | None, low: float, high: float, *, open_low: bool = False
) -> None:
    if value is None or (low <= value <= high and not (open_low and value == low)):
        return
    bound = "greater than" if open_low else "at least"
    raise ValueError(f"{field} must be {bound} {low} and at most {high}, got {shown(value)}")
