"""Schemas with instances: what is accepted, judged by a validator that knows no grammars."""

import json
from pathlib import Path

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.structured import Judge, cases
from minisgl.build import BUNDLED_MODEL

FOLDER = Path(__file__).parent / "cases"
CASES = list(cases(FOLDER))
# Valid instances that are not accepted, which is told in docs/STRUCTURED.md.
REFUSED_VALID = {"number[14]": [0.2]}


@pytest.fixture(scope="module")
def judge():
    made = Judge(BUNDLED_MODEL)
    yield made
    made.backend.close()


def validator(schema):
    kind = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    return kind(schema)


def test_the_cases_say_what_the_validator_says():
    """But for formats, for which it needs other packages, and for references that lead nowhere."""
    assert len(CASES) >= 150
    for name, case in CASES:
        if "format" in json.dumps(case["schema"]) or case["schema"] in (
            {"$ref": "#"},
            {"$ref": "#/$defs/missing"},
            {"$ref": "https://example.com/schema.json"},
            {"$dynamicRef": "#a"},
        ):
            continue
        try:
            valid = [validator(case["schema"]).is_valid(test["data"]) for test in case["tests"]]
        except Exception:
            assert "(a" in json.dumps(case["schema"])  # no regular expression
            continue
        assert valid == [test["valid"] for test in case["tests"]], name


@pytest.mark.parametrize(("name", "case"), CASES, ids=[name for name, _ in CASES])
def test_no_invalid_instance_is_accepted(judge, name, case):
    verdict = judge.judge(case)
    assert verdict.accepted_invalid == []
    assert verdict.refused_valid == REFUSED_VALID.get(name, [])
    if verdict.refusal is not None:
        assert verdict.refusal.startswith("structured_outputs.json: #")


def test_what_is_refused_is_told_by_name(judge):
    """No more than these: a schema that used to be kept would be missed."""
    refused = {name: judge.judge(case).refusal for name, case in CASES}
    assert sum(each is not None for each in refused.values()) == 33


KEYWORDS = {
    "minimum": st.integers(-3, 3),
    "maximum": st.integers(-3, 12),
    "exclusiveMinimum": st.integers(-3, 3),
    "multipleOf": st.sampled_from([1, 2, 0.5, 3]),
    "minLength": st.integers(0, 2),
    "maxLength": st.integers(0, 3),
    "pattern": st.sampled_from(["^a", "b$", '^[^"]*$', "^[^\\\\]+$", "a|b", "^.?$", '^[ab"]*$']),
    "minItems": st.integers(0, 2),
    "maxItems": st.integers(0, 2),
    "required": st.lists(st.sampled_from("ab"), max_size=2, unique=True),
    "minProperties": st.integers(0, 2),
    "maxProperties": st.integers(0, 2),
    "type": st.sampled_from(["integer", "number", "string", "array", "object", "null", "boolean"]),
    "enum": st.lists(st.sampled_from([None, 1, 2.5, "a", 'b"', True, [1], {"a": 1}]), max_size=3),
    "const": st.sampled_from([None, 1, 2.5, "a", "\\", False, [], {"b": "a"}]),
}


def within(inner):
    return st.fixed_dictionaries(
        {},
        optional=KEYWORDS
        | {
            "items": inner,
            "prefixItems": st.lists(inner, min_size=1, max_size=2),
            "properties": st.dictionaries(st.sampled_from(["a", "b"]), inner, max_size=2),
            "additionalProperties": inner,
            "patternProperties": st.dictionaries(st.sampled_from(["^a", "c$"]), inner, max_size=2),
            "anyOf": st.lists(inner, min_size=1, max_size=2),
            "oneOf": st.lists(inner, min_size=1, max_size=2),
            "allOf": st.lists(inner, min_size=1, max_size=2),
        },
    )


SCHEMAS = st.recursive(
    st.fixed_dictionaries({}, optional=KEYWORDS) | st.booleans(), within, max_leaves=5
)
VALUES = st.recursive(
    st.sampled_from([None, True, False, 0, 1, -2, 3, 2.5, 0.5, "", "a", "b", "ab", 'b"', "\\"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "c", "ac"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(SCHEMAS, st.lists(VALUES, min_size=12, max_size=12))
def test_no_invalid_instance_of_any_schema_is_accepted(judge, schema, values):
    valid = validator(schema).is_valid
    tests = [{"valid": valid(value), "data": value} for value in values]
    assert judge.judge({"schema": schema, "tests": tests}).accepted_invalid == []
