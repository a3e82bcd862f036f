"""Sampling parameters cannot be wrong: the field, its limit and the value are named."""

import pytest

from minisgl.core.request import SamplingParams


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
        ({"top_k": -1}, ValueError, "top_k must be at least 0 .*, got -1"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got '1'"),
        ({"temperature": float("nan")}, ValueError, "temperature .*, got nan"),
        ({"top_p": 0.0}, ValueError, "top_p must be greater than 0.0 and at most 1.0, got 0.0"),
        ({"seed": 2**64}, ValueError, "seed .* at most 18446744073709551615"),
        ({"seed": 10**400}, ValueError, r"got 10+\.\.\.0+$"),
        ({"seed": "x" * 400}, TypeError, r"got 'x+\.\.\.x+'$"),
        ({"stop": [1]}, TypeError, "stop must hold strings, got 1"),
        ({"stop": 1}, TypeError, "stop must be a string or a list, got 1"),
        ({"stop_token_ids": 0}, TypeError, "stop_token_ids must be a list, got 0"),
        ({"logit_bias": [5]}, TypeError, r"logit_bias must be a mapping or pairs, got \[5\]"),
        ({"logit_bias": 1.5}, TypeError, "logit_bias must be a mapping or pairs, got 1.5"),
        ({"stop": ""}, ValueError, "stop must not contain an empty string"),
        ({"stop_token_ids": [1.0]}, TypeError, "stop_token_ids must hold ints, got 1.0"),
        ({"stop_token_ids": [-1]}, ValueError, "stop_token_ids must be at least 0, got -1"),
        ({"logit_bias": {1.5: 1.0}}, TypeError, "logit_bias must map ints to numbers, got 1.5"),
        ({"logit_bias": {1: 101}}, ValueError, "logit_bias .* at most 100.0, got 101"),
        ({"ignore_eos": 1}, TypeError, "ignore_eos must be a bool, got 1"),
    ],
)
def test_wrong_values_are_refused(values, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**values)


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
