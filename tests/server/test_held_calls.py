"""Calls in forms that the model was never trained for, held to their schemas, by a real server."""

import json

import openai
import pytest

from tests.server.served import Served, calling_model

WEATHER = {
    "type": "object",
    "properties": {
        "place": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
        "kind": {"enum": ["rain", "wind"]},
    },
    "required": ["place", "days", "kind"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "clock"}},
]


@pytest.fixture(scope="module", params=["hermes", "qwen3_coder"])
def client(request, tmp_path_factory):
    model = calling_model(tmp_path_factory.mktemp("model"))
    parser = f"--tool-call-parser={request.param}"
    server = Served("--model", str(model), "--reasoning-parser=none", parser)
    with server.client() as client:
        yield client
    server.close()


def ask(client, **options):
    options = {"tools": TOOLS, "max_tokens": 400, "temperature": 1.0, "seed": 1} | options
    messages = [{"role": "user", "content": "How is the weather?"}]
    name = client.models.list().data[0].id
    return client.chat.completions.create(model=name, messages=messages, **options)


def check(calls):
    """Whether they are calls of the tools, to their schemas."""
    for call in calls:
        arguments = json.loads(call.function.arguments)
        if call.function.name == "clock":
            assert arguments == {}
            continue
        assert call.function.name == "weather"
        assert list(arguments) == ["place", "days", "kind"]
        assert len(arguments["place"]) <= 12
        assert arguments["days"] in range(10)
        assert arguments["kind"] in ("rain", "wind")


def test_a_call_is_made_where_one_is_required(client):
    choices = ask(client, tool_choice="required", parallel_tool_calls=False, n=8).choices
    assert {choice.finish_reason for choice in choices} == {"tool_calls"}
    assert {len(choice.message.tool_calls) for choice in choices} == {1}
    assert {choice.message.content for choice in choices} == {None}
    for choice in choices:
        check(choice.message.tool_calls)


@pytest.mark.parametrize("name", ["weather", "clock"])
def test_a_named_tool_is_called_once(client, name):
    choice = {"type": "function", "function": {"name": name}}
    whole = ask(client, tool_choice=choice).choices[0]
    assert whole.finish_reason == "stop"
    (call,) = whole.message.tool_calls
    assert call.function.name == name
    check([call])
    chunks = [c.choices[0] for c in ask(client, tool_choice=choice, stream=True)]
    deltas = [delta for chunk in chunks for delta in chunk.delta.tool_calls or ()]
    assert "".join(d.function.arguments for d in deltas) == call.function.arguments
    assert chunks[-1].finish_reason == "stop"


def test_a_model_may_do_without_calls_that_would_be_exact(client):
    choices = ask(client, n=8, max_tokens=60).choices
    assert any(choice.message.content for choice in choices)
    for choice in choices:
        check(choice.message.tool_calls or [] if choice.finish_reason == "tool_calls" else [])


def test_what_cannot_be_kept_is_refused_with_its_place(client):
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"not": {}}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, tools=[*TOOLS, {"type": "function", "function": function | {"strict": True}}])
    assert "tools: parameters of f: #/properties/a" in caught.value.message
    assert caught.value.param == "tools"
    lenient = [{"type": "function", "function": function}]
    choice = {"type": "function", "function": {"name": "f"}}
    answer = ask(client, tools=[*TOOLS, *lenient], tool_choice="required")
    warning = "parameters of f: #/properties/a/not: not is not supported; it is left out"
    assert answer.model_dump()["minisgl_warnings"] == [f"tools: {warning}"]
    (answer,) = ask(client, tools=lenient, tool_choice=choice).choices
    arguments = answer.message.tool_calls[0].function.arguments
    is_cut = answer.finish_reason == "length"  # within a text, which may be of any length
    assert is_cut or isinstance(json.loads(arguments), dict)
    named = {"name": "n", "schema": {"not": {}, "enum": [1]}}
    answer = ask(client, response_format={"type": "json_schema", "json_schema": named})
    (warning,) = answer.model_dump()["minisgl_warnings"]
    assert warning.startswith("response_format.json_schema.schema: #/not: ")


def test_an_answer_by_a_schema_may_be_a_call_instead(client):
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": WEATHER, "strict": True}}
    whole = ask(client, response_format=asked, n=8)
    for choice in whole.choices:
        check(choice.message.tool_calls or [])
        if choice.message.content is not None:
            assert list(json.loads(choice.message.content)) == ["place", "days", "kind"]
    unsupported = {"name": "n", "schema": {"not": {}}, "strict": True}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, response_format={"type": "json_schema", "json_schema": unsupported})
    assert "response_format.json_schema.schema: #/not: not is not supported" in caught.value.message
    assert caught.value.param == "response_format"


def test_the_parse_helper_reads_strict_calls(client):
    completion = client.chat.completions.parse(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": "Weather?"}],
        tools=TOOLS[:1],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=400,
        temperature=1.0,
        seed=2,
    )
    (call,) = completion.choices[0].message.tool_calls
    assert call.function.parsed_arguments["days"] in range(10)
