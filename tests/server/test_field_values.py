"""Refusals that say what would have been right: a field's few values, and names we give it."""

import json

import pytest

from minisgl.core.request import STRUCTURES, SamplingParams
from minisgl.server.body import ELSEWHERE, ApiError
from minisgl.server.chat import parse_chat
from minisgl.server.completions import parse_completion
from minisgl.server.fields import ChatBody, Function, Tool
from minisgl.server.responses import parse_response
from tests.server.fake_engine import served_model

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}
CALLING = {"role": "assistant", "tool_calls": [{"id": "a", "type": "x", "function": {}}]}
ROLES = '"system", "developer", "user", "assistant" or "tool"'
CHOICES = 'a tool, "none", "auto" or "required"'


def refusal(parse=parse_chat, **fields):
    body = ({"messages": [USER]} if parse is parse_chat else {}) | fields
    with pytest.raises(ApiError) as caught:
        parse(json.dumps(body).encode(), served_model())
    return caught.value.body["error"]


@pytest.mark.parametrize(
    ("fields", "param", "allowed", "got"),
    [
        (
            {"response_format": {"type": "xml"}},
            "response_format.type",
            '"text", "json_object" or "json_schema"',
            "xml",
        ),
        ({"tool_choice": "sometimes"}, "tool_choice", CHOICES, "sometimes"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "any", "function": {"name": "f"}}},
            "tool_choice.type",
            '"function"',
            "any",
        ),
        ({"tools": [TOOL, TOOL | {"type": "web"}]}, "tools[1].type", '"function"', "web"),
        ({"messages": [USER, USER | {"role": "bot"}]}, "messages[1].role", ROLES, "bot"),
        (
            {"messages": [USER | {"content": [{"type": "image_url", "text": ""}]}]},
            "messages[0].content[0].type",
            '"text"',
            "image_url",
        ),
        ({"messages": [CALLING]}, "messages[0].tool_calls[0].type", '"function"', "x"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_field_of_few_values_names_them(fields, param, allowed, got):
    error = refusal(**fields)
    assert error["message"] == f'{param} must be {allowed}, got "{got}"'
    assert error["param"] == param


@pytest.mark.parametrize(
    ("name", "given", "allowed"),
    [
        ("service_tier", "flex", '"auto" or "default"'),
        ("modalities", ["audio"], '["text"]'),
        ("store", True, "false"),
    ],
)
def test_a_field_that_is_not_supported_names_what_asks_for_nothing(name, given, allowed):
    message = f"{name} is not supported, got {json.dumps(given)}; it may be {allowed}"
    assert refusal(**{name: given})["message"] == message


@pytest.mark.parametrize(
    ("name", "ours"),
    [(name, ours) for ours, names in ELSEWHERE.items() for name in names.split()],
)
def test_a_field_of_another_engine_suggests_that_of_this_body(name, ours):
    field, _, within = ours.partition(".")
    body, parse, path = {"prompt": "hi", name: 3}, parse_completion, ""
    if field == "max_output_tokens":
        body, parse = {"input": "hi", name: 3}, parse_response
    elif field == "chat_template_kwargs":
        body, parse = {name: 3}, parse_chat
    elif field == "function":
        body, parse, path = {"tools": [{name: 3}]}, parse_chat, "tools[0]."
    message = f"{path}{name} is not a field that is supported; did you mean {ours}?"
    assert refusal(parse, **body)["message"] == message
    known = {
        *SamplingParams.__struct_fields__,
        *ChatBody.__struct_fields__,
        *Tool.__struct_fields__,
    }
    assert field in known | {"max_output_tokens"}
    assert field != "structured_outputs" or within in STRUCTURES
    assert field != "function" or within in Function.__struct_fields__
