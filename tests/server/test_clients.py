"""The openai client's helpers against the real server, whose model is held to what they ask."""

import json
from typing import Literal

import openai
import pydantic
import pytest

from tests.server.served import Served, calling_model

USER = [{"role": "user", "content": "How is the weather in Oslo?"}]


class Weather(pydantic.BaseModel):
    """The weather at a place."""

    place: str = pydantic.Field(max_length=12)
    days: int = pydantic.Field(ge=0, le=9)
    kind: Literal["rain", "wind"]


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = calling_model(tmp_path_factory.mktemp("model"))
    server = Served(f"--model={folder}", "--reasoning-parser=none", "--served-model-name=tiny")
    with server.client() as client:
        yield client
    server.close()


CHAT = {"model": "tiny", "messages": USER, "max_tokens": 400}
RESPONSE = {"model": "tiny", "input": USER, "max_output_tokens": 400}
CHAT_TOOLS = {
    "tools": [openai.pydantic_function_tool(Weather)],
    "tool_choice": "required",
    "parallel_tool_calls": False,
}
RESPONSE_TOOLS = CHAT_TOOLS | {"tools": [openai.pydantic_responses_function_tool(Weather)]}


def test_chat_parse_gives_objects(client):
    message = client.chat.completions.parse(**CHAT, response_format=Weather).choices[0].message
    assert isinstance(message.parsed, Weather)
    message = client.chat.completions.parse(**CHAT, **CHAT_TOOLS).choices[0].message
    assert isinstance(message.tool_calls[0].function.parsed_arguments, Weather)


def test_chat_streams_give_objects(client):
    with client.chat.completions.stream(**CHAT, response_format=Weather) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0].message
    assert {"content.delta", "content.done"} <= kinds
    assert isinstance(final.parsed, Weather)
    with client.chat.completions.stream(**CHAT, **CHAT_TOOLS) as stream:
        done = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion().choices[0].message
    assert [isinstance(event.parsed_arguments, Weather) for event in done] == [True]
    assert isinstance(final.tool_calls[0].function.parsed_arguments, Weather)


def test_responses_parse_gives_objects(client):
    answer = client.responses.parse(**RESPONSE, text_format=Weather)
    assert isinstance(answer.output_parsed, Weather)
    (call,) = client.responses.parse(**RESPONSE, **RESPONSE_TOOLS).output
    assert isinstance(call.parsed_arguments, Weather)


def test_responses_streams_give_objects(client):
    with client.responses.stream(**RESPONSE, text_format=Weather) as stream:
        (done,) = (event for event in stream if event.type == "response.output_text.done")
        final = stream.get_final_response()
    assert isinstance(done.parsed, Weather)
    assert final.output_parsed == done.parsed
    with client.responses.stream(**RESPONSE, **RESPONSE_TOOLS) as stream:
        snapshots = [e.snapshot for e in stream if e.type.endswith("arguments.delta")]
        (call,) = stream.get_final_response().output
    assert snapshots[-1] == call.arguments
    assert isinstance(call.parsed_arguments, Weather)


def test_a_response_and_its_stream_are_the_same_text(client):
    asked = RESPONSE | {"temperature": 0, "max_output_tokens": 40}
    whole = client.responses.create(**asked)
    *_, last = client.responses.create(**asked, stream=True)
    chat = client.chat.completions.create(**CHAT | {"temperature": 0, "max_tokens": 40})
    assert whole.output_text == last.response.output_text == chat.choices[0].message.content
    assert whole.usage.output_tokens == chat.usage.completion_tokens


def test_a_loop_of_calls_ends_in_text(client):
    items = [*USER]
    for _ in range(2):
        (call,) = client.responses.create(**RESPONSE | {"input": items}, **RESPONSE_TOOLS).output
        result = json.dumps({"known": json.loads(call.arguments)["place"]})
        output = {"type": "function_call_output", "call_id": call.call_id, "output": result}
        items += [call, output]
    answer = client.responses.create(**RESPONSE | {"input": items, "max_output_tokens": 30})
    assert answer.output_text
    assert answer.usage.input_tokens_details.cached_tokens > 0


def test_a_schema_that_cannot_be_kept_is_refused_in_this_apis_words(client):
    form = {"type": "json_schema", "name": "n", "schema": {"not": {}}, "strict": True}
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**RESPONSE, text={"format": form})
    assert caught.value.param == "text.format"
    assert "text.format.schema: #/not: not is not supported" in caught.value.message
    form["strict"] = False
    answer = client.responses.create(
        **RESPONSE, text={"format": form | {"schema": {"not": {}, "enum": [1]}}}
    )
    (warning,) = answer.model_dump()["minisgl_warnings"]
    assert warning == "#/not: not is not supported; it is left out"
    function = {"type": "function", "name": "f", "strict": True}
    schema = {"type": "object", "properties": {"a": {"not": {}}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(**RESPONSE, tools=[function | {"parameters": schema}])
    assert "tools: parameters of f: #/properties/a" in caught.value.message
