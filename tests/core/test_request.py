"""Sampling parameters cannot be wrong: the field, its limit and the value are named."""

import math
import re
from pathlib import Path

import pytest

from minisgl.core.request import NEUTRAL, RANGES, SamplingParams


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1"),
        ({"max_tokens": 2.5}, TypeError, "max_tokens must be an int, got 2.5"),
        ({"max_tokens": True}, TypeError, "max_tokens must be an int, got True"),
        ({"max_tokens": 2**31}, ValueError, "max_tokens .* at most 2147483647, got 2147483648"),
        ({"min_tokens": 2**31}, ValueError, "min_tokens .* at most 2147483647, got 2147483648"),
        ({"min_tokens": 3, "max_tokens": 2}, ValueError, r"at most max_tokens \(2\), got 3"),
        ({"top_k": 2**31}, ValueError, "top_k .* at most 2147483647, got 2147483648"),
        ({"top_k": -2}, ValueError, "top_k must be at least -1 .*, got -2"),
        ({"min_tokens": None}, TypeError, "min_tokens must be an int, got None"),
        ({"n": None}, TypeError, "n must be an int, got None"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"temperature": float("nan")}, ValueError, "temperature .*, got nan"),
        ({"top_p": 0.0}, ValueError, "top_p must be greater than 0.0 and at most 1.0, got 0.0"),
        ({"seed": 2**64}, ValueError, "seed .* at most 18446744073709551615"),
        ({"seed": 10**400}, ValueError, r"got 10+\.\.\.0+$"),
        ({"repetition_penalty": 1e-45}, ValueError, "repetition_penalty must be at least 0.01 .*"),
        ({"stop": ["x"] * 65}, ValueError, "number of stop strings must be .* at most 64, got 65"),
        ({"stop_token_ids": [2**31]}, ValueError, "stop_token_ids must be .* at most 2147483647"),
        ({"seed": "x" * 400}, TypeError, r"got 'x+\.\.\.x+'$"),
        ({"stop": [1]}, TypeError, "stop must hold strings, got 1"),
        ({"stop": 1}, TypeError, "stop must be a string or a list, got 1"),
        ({"stop_token_ids": 0}, TypeError, "stop_token_ids must be a list, got 0"),
        ({"logit_bias": [5]}, TypeError, r"logit_bias must be a mapping or pairs, got \[5\]"),
        ({"logit_bias": 1.5}, TypeError, "logit_bias must be a mapping or pairs, got 1.5"),
        ({"stop": ""}, ValueError, "stop must not contain an empty string"),
        ({"stop_token_ids": [1.0]}, TypeError, "stop_token_ids must hold ints, got 1.0"),
        ({"stop_token_ids": [-1]}, ValueError, "stop_token_ids must be at least 0 .*, got -1"),
        ({"logit_bias": {1.5: 1.0}}, TypeError, "logit_bias must map ints to numbers, got 1.5"),
        ({"logit_bias": {1: 101}}, ValueError, "logit_bias .* at most 100.0, got 101"),
        ({"ignore_eos": 1}, TypeError, "ignore_eos must be a bool, got 1"),
    ],
)
def test_wrong_values_are_refused(values, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**values)


@pytest.mark.parametrize("name", RANGES)
def test_what_is_outside_a_range_is_refused_with_both_ends(name):
    for end, beyond in zip(RANGES[name], (-1, 1), strict=True):
        if isinstance(end, int):
            outside = [end + beyond, end + beyond * 10**30]
        else:
            outside = [math.nextafter(end, beyond * math.inf), beyond * math.inf, math.nan]
        for value in outside:
            with pytest.raises(ValueError, match=f"^{name} must be") as refused:
                SamplingParams(**{name: value})
            assert all(str(limit) in str(refused.value) for limit in RANGES[name])


def test_the_documents_state_the_ranges():
    text = (Path(__file__).parents[2] / "docs/TEXT.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| (\S+ to \S+) \|", text, re.MULTILINE))
    powers = {2**31 - 1: "2³¹-1", -(2**63): "-2⁶³", 2**64 - 1: "2⁶⁴-1"}
    for name, ends in RANGES.items():
        least, most = (powers.get(end, f"{end:g}") for end in ends)
        assert rows[name] == f"{least} to {most}"


def test_what_is_not_said_is_the_models_own_and_what_is_said_stays():
    defaults = NEUTRAL | {"temperature": 0.6, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    assert SamplingParams().completed() == SamplingParams(
        temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0
    )
    neutral = SamplingParams(temperature=1, top_k=0, min_p=0, repetition_penalty=1, seed=3)
    assert neutral.completed(defaults) == neutral.completed()
    some = SamplingParams(top_k=0, max_tokens=5).completed(defaults)
    assert (some.temperature, some.top_k, some.top_p, some.min_p) == (0.6, 0, 1.0, 0.1)
    assert some.needs_counts
    assert some.completed() == some


def test_what_other_engines_write_is_taken():
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)
    assert SamplingParams(seed=-1).seed == 2**64 - 1


def test_friendly_forms_are_taken():
    params = SamplingParams(stop="end", stop_token_ids=[3], logit_bias={5: 1, 6: -2.5}, top_p=1)
    assert params.stop == ("end",)
    assert params.stop_token_ids == (3,)
    assert params.logit_bias == ((5, 1), (6, -2.5))
    absent = SamplingParams(stop=None, stop_token_ids=None, logit_bias=None)
    assert absent == SamplingParams()


@pytest.mark.parametrize("temperature", [0, 5e-324, 1e-38, 9.9e-6])
def test_a_temperature_near_zero_is_greedy(temperature):
    assert SamplingParams(temperature=temperature).temperature == 0.0


@pytest.mark.parametrize("temperature", [1e-5, 1e-3, 1])
def test_a_temperature_that_fp32_can_divide_by_is_kept(temperature):
    assert SamplingParams(temperature=temperature).temperature == temperature
