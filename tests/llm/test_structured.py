"""Structured output beside every other feature: the same tokens in fp32, which hold to it."""

import json
import re
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import jsonschema
import pytest

from benchmarks.speculative import SIDES
from minisgl import LLM, SamplingParams
from minisgl.core.forced_policy import ForcedPolicy

BASE: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "max_total_tokens": 8192,
    "max_running_requests": 24,
    "log_level": "warning",
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
SPECS: list[dict[str, Any] | None] = [
    {"json": SCHEMA},
    {"regex": r"([a-z]{2,5}-){2}[0-9]{4}"},
    {"json_object": True},
    {"choice": ["red", "green", "a bluish grey"]},
    {"grammar": 'root ::= "[" word ("," word)* "]"\nword ::= [a-z]+'},
    None,
]
PROMPTS = ["Describe the KV cache: ", "KV KV KV KV KV", '{"name": "a", "age": 3, "tags": ["red']


def open_llm(**options: Any) -> LLM:
    with patch("minisgl.build.DraftPolicy", lambda *_, **__: None):  # drafts, if it pays or not
        return LLM(**BASE | options)


@pytest.fixture(scope="module", autouse=True)
def _force() -> Iterator[None]:
    """Forced tokens too."""
    with patch.multiple(ForcedPolicy, looks=lambda _: True, pays=lambda *_, **__: True):
        yield


def requests() -> tuple[list[str], list[SamplingParams]]:
    prompts, params = [], []
    for i in range(24):
        prompts.append(PROMPTS[i % 3])
        params.append(
            SamplingParams(
                max_tokens=[100, 100, 7][i % 3],
                temperature=[0.0, 0.8, 1.0][i // 3 % 3],
                top_k=[0, 40][i % 2],
                repetition_penalty=[1.0, 1.2][i // 2 % 2],
                seed=i,
                n=1 + i % 2,
                logprobs=[None, 2][i // 5 % 2],
                stop=[(), ("e", "1")][i // 7 % 2],
                structured_outputs=SPECS[i % len(SPECS)],
            )
        )
    return prompts, params


def ask(llm: LLM) -> list[list[Any]]:
    return [output.outputs for output in llm.generate(*requests(), use_tqdm=False)]


@pytest.fixture(scope="module")
def plain() -> Iterator[list[list[Any]]]:
    with open_llm() as llm:
        yield ask(llm)


def test_what_is_said_holds(plain):
    """A text that ends by itself is whole, whatever ended it is told truly."""
    whole = cut = stopped = 0
    for params, choices in zip(requests()[1], plain, strict=True):
        given = json.loads(params.structured_outputs or "null")
        for choice in choices:
            if given is None:
                continue
            if choice.finish_reason == "length":
                assert len(choice.token_ids) == params.max_tokens
                cut += 1
                continue
            assert choice.finish_reason == "stop"
            if choice.stop_reason in params.stop:
                stopped += 1
                continue
            assert isinstance(choice.stop_reason, int)
            whole += 1
            match given:
                case {"json": schema}:
                    jsonschema.validate(json.loads(choice.text), schema)
                case {"regex": expression}:
                    assert re.fullmatch(expression, choice.text)
                case {"json_object": _}:
                    assert isinstance(json.loads(choice.text), dict)
                case {"choice": texts}:
                    assert choice.text in texts
                case {"grammar": _}:
                    assert re.fullmatch(r"\[[a-z]+(,[a-z]+)*\]", choice.text)
    assert whole >= 10
    assert cut >= 5
    assert stopped >= 1


SETTINGS = {
    "tokens drawn one by one": {"disable_forced_tokens": True},
    "no overlap": {"disable_overlap_schedule": True},
    "a draft model": SIDES["draft"],
    "a draft model without overlap": SIDES["draft"] | {"disable_overlap_schedule": True},
    "n-grams": SIDES["ngram"],
    "n-grams without overlap": SIDES["ngram"] | {"disable_overlap_schedule": True},
    "preemptions": {"max_total_tokens": 176},
    "preemptions and n-grams": SIDES["ngram"] | {"max_total_tokens": 176},
    "small chunks": {"chunked_prefill_size": 5, "page_size": 1},
    "no prefix cache": {"disable_radix_cache": True},
    "no graphs": {"disable_cuda_graph": True},
    "two ranks": {"tp_size": 2},
    "two ranks and n-grams": SIDES["ngram"] | {"tp_size": 2},
}


RARE = {"a draft model without overlap", "small chunks", "no graphs", "two ranks"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.thorough) if n in RARE else n for n in SETTINGS],
)
def test_every_setting_says_the_same(plain, name):
    with open_llm(**SETTINGS[name]) as llm:
        for _ in range(2):  # the second time the prompts are found in the cache
            for expected, found in zip(plain, ask(llm), strict=True):
                for a, b in zip(expected, found, strict=True):
                    assert (a.token_ids, a.text) == (b.token_ids, b.text)
                    assert (a.finish_reason, a.stop_reason) == (b.finish_reason, b.stop_reason)
                    for x, y in zip(a.logprobs or (), b.logprobs or (), strict=True):
                        assert x.token_id == y.token_id
                        assert x.logprob == pytest.approx(y.logprob, abs=1e-3)
        stats = llm.stats().scheduler
        assert (stats.num_forced_tokens > 0) == (name != "tokens drawn one by one")
        assert stats.num_hit_tokens > 0 or name == "no prefix cache"
        assert stats.num_preemptions > 0 or not name.startswith("preemptions")
        assert stats.num_accepted_drafts > 0 or not {"draft", "n-grams"} & {*name.split()}


def test_refusals_and_warnings_reach_the_caller():
    with open_llm() as llm:
        schema = {"type": "object", "not": {"required": ["a"]}}
        strict = SamplingParams(structured_outputs={"json": schema})
        with pytest.raises(ValueError, match="#/not: not is not supported"):
            llm.generate("x", strict, use_tqdm=False)
        with pytest.raises(ValueError, match="#/not: not is not supported"):
            list(llm.stream("x", strict))
        lenient = SamplingParams(
            max_tokens=40, structured_outputs={"json": schema, "strict": False}, n=2
        )
        output = llm.generate("x", lenient, use_tqdm=False)
        assert output.warnings == ["#/not: not is not supported; it is left out"]
        (heavy,) = llm.generate(["x"], SamplingParams(max_tokens=1), use_tqdm=False)
        assert heavy.warnings == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"json": {}, "regex": "a"}, "must hold one of .* got .'json', 'regex'."),
        ({"jsn": {}}, "must hold one of .* got .'jsn'."),
        ({"regex": 1}, r"structured_outputs.regex must be of type string, got 1"),
        ({"choice": "ab"}, r"structured_outputs.choice must be of type array, got 'ab'"),
        ({"json_object": False}, "structured_outputs.json_object must be true .*, got false"),
        ({"json_object": 1}, "structured_outputs.json_object must be of type boolean, got 1"),
        ({"json": 1}, "structured_outputs.json must be of type object or boolean or string, got"),
        (
            {"regex": "a", "strict": True},
            "structured_outputs.strict .* goes with json alone, got True beside regex",
        ),
        (
            {"json": {}, "strict": 1},
            "structured_outputs.strict must be a boolean, .* got 1 beside json",
        ),
        ({"choice": ["\ud800"]}, "cannot be read as JSON: .*surrogates"),
        ({"regex": "a" * 2**20}, "bytes of structured_outputs must be .* at most 1048576, got"),
        ([1], "structured_outputs must be an object, got .1."),
        ("{", "structured_outputs cannot be read as JSON"),
    ],
    ids=range(13),
)
def test_wrong_values_are_refused_where_they_are_made(given, says):
    with pytest.raises((ValueError, TypeError), match=says):
        SamplingParams(structured_outputs=given)


@pytest.mark.parametrize("more", [{"ignore_eos": True}, {"min_tokens": 1}])
def test_what_would_move_the_end_is_refused_beside_it(more):
    (name,) = more
    with pytest.raises(ValueError, match=f"{name} cannot be given with structured_outputs"):
        SamplingParams(structured_outputs={"regex": "a"}, **more)
