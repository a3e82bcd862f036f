"""The Responses API over HTTP, of a model that says what the test tells it to."""

import json

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

from minisgl.server import calls
from tests.server.calls import eventually, sse
from tests.server.fake_engine import CACHED, ServerThread
from tests.server.tool_models import CALL, CLOCK, WEATHER, model

TOOLS = [{"type": "function", **tool["function"]} for tool in (WEATHER, CLOCK)]
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
DONE = ("response.completed", "response.incomplete")


@pytest.fixture(scope="module")
def thread():
    server = ServerThread(model=model())
    yield server
    server.close()


@pytest.fixture
def engine(thread):
    thread.engine.reset()
    return thread.engine


@pytest.fixture
def client(thread):
    with OpenAI(base_url=f"{thread.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, **options):
    asked = {"model": "test-model", "input": "hi", "tools": TOOLS} | options
    return client.responses.create(**asked)


def said(response):
    """The items of an answer without their ids, which are new in each."""
    items = [
        item.model_dump(exclude={"id", "call_id"}, exclude_none=True) for item in response.output
    ]
    return response.status, items


def test_an_answer_has_the_shape_of_openais(client, engine):
    engine.text = f"<think>Hm.</think>Let me see.\n{CALL}"
    answer = ask(client, instructions="Be kind.", metadata={"a": "b"}, temperature=0.5)
    thought, message, call = answer.output
    assert answer.id.startswith("resp_")
    assert [item.id.split("_")[0] for item in answer.output] == ["rs", "msg", "fc"]
    assert thought.content[0].text == "Hm."
    assert (message.role, message.status) == ("assistant", "completed")
    assert answer.output_text == "Let me see."
    assert (call.name, json.loads(call.arguments)) == ("weather", {"place": "Köln {"})
    assert call.call_id.startswith("call_")
    assert (answer.status, answer.error, answer.incomplete_details) == ("completed", None, None)
    assert (answer.instructions, answer.metadata, answer.temperature) == (
        "Be kind.",
        {"a": "b"},
        0.5,
    )
    assert answer.model_dump()["store"] is False
    assert (answer.top_p, answer.tool_choice, answer.tools[0].strict) == (1.0, "auto", False)
    assert ask(client).temperature == engine.model.sampling_defaults["temperature"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_per_delta", [1, 7])
def test_usage_is_exact(client, engine, stream, tokens_per_delta):
    engine.text, engine.tokens_per_delta = "<think>Hm, so.</think>\n\nYes.", tokens_per_delta
    answer = ask(client, stream=stream)
    usage = ([*answer][-1].response if stream else answer).usage
    assert usage.output_tokens > 5
    encode = engine.model.tokenizer.encode
    assert usage.input_tokens == len(engine.requests[0].prompt_token_ids)
    assert usage.input_tokens_details.cached_tokens == CACHED
    assert usage.output_tokens == len(encode(engine.text, add_special_tokens=False)) + 1
    thought = encode("<think>Hm, so.</think>", add_special_tokens=False)
    assert usage.output_tokens_details.reasoning_tokens == len(thought)
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_the_events_of_a_stream_come_in_openais_order(client, engine):
    engine.text = f"<think>Hm.</think>Let me see.\n{CALL}{CALL}"
    events = [*ask(client, stream=True)]
    assert [event.sequence_number for event in events] == [*range(len(events))]
    names = [event.type.removeprefix("response.") for event in events]
    once = [n for i, n in enumerate(names) if not (n.endswith("delta") and names[i - 1] == n)]
    call = ["output_item.added", *(f"function_call_arguments.{x}" for x in ("delta", "done"))]
    assert once == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done"),
        *([*call, "output_item.done"] * 2),
        "completed",
    ]
    output = events[-1].response.output
    for event in events:
        if hasattr(event, "item_id"):
            assert event.item_id == output[event.output_index].id
        if event.type == "response.output_item.added":
            assert event.item.status == "in_progress"
        if event.type == "response.output_item.done":
            assert event.item.to_dict() == output[event.output_index].to_dict()
    assert events[0].response.output == []
    assert events[0].response.status == "in_progress"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 3
    assert "".join(deltas) == "Let me see."


def test_the_wire_names_each_event(thread, engine):
    engine.text = "Yes."
    body = {"input": "hi", "stream": True}
    response = httpx.post(f"{thread.url}/v1/responses", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    for event in sse(response):
        name, _, data = event.partition("\ndata: ")
        assert name.removeprefix("event: ") == json.loads(data)["type"]
    assert json.loads(data)["type"] == "response.completed"  # and no [DONE]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_stream_builds_the_whole_answer_and_chat_says_the_same(thread, data):
    thread.engine.reset()
    pieces = ["<think>", "</think>", CALL, CALL[:40], "<tool", " ", "\n", "Köln", "}", "🚀"]
    thread.engine.text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=6)))
    thread.engine.tokens_per_delta = data.draw(st.integers(1, 9))
    limit = data.draw(st.sampled_from([None, 5, 20]))
    with OpenAI(base_url=f"{thread.url}/v1", api_key="none", max_retries=0) as client:
        whole = ask(client, max_output_tokens=limit)
        asked = {"model": "test-model", "input": "hi", "tools": TOOLS}
        with client.responses.stream(**asked, max_output_tokens=limit) as stream:
            last = [*stream][-1]
        user = [{"role": "user", "content": "hi"}]
        chat = client.chat.completions.create(
            model="test-model", messages=user, tools=[WEATHER, CLOCK], max_tokens=limit
        )
    assert last.type == f"response.{whole.status}"
    assert said(last.response) == said(whole)
    assert last.response.usage == whole.usage
    choice = chat.choices[0]
    assert whole.status == ("incomplete" if choice.finish_reason == "length" else "completed")
    assert whole.output_text == (choice.message.content or "")
    calls = [(i.name, i.arguments) for i in whole.output if i.type == "function_call"]
    others = choice.message.tool_calls or []
    assert calls == [(call.function.name, call.function.arguments) for call in others]
    thoughts = [part.text for i in whole.output if i.type == "reasoning" for part in i.content]
    assert thoughts == [getattr(choice.message, "reasoning_content", None)] * len(thoughts)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("text", "limit"), [("Well, well, well.", 4), (CALL, 12)])
def test_what_is_cut_is_incomplete(client, engine, stream, text, limit):
    engine.text = text
    answer = ask(client, max_output_tokens=limit, stream=stream)
    if stream:
        *_, last = answer
        assert last.type == "response.incomplete"
        answer = last.response
    assert answer.status == answer.output[-1].status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.output_tokens == limit


def test_a_call_that_breaks_off_is_incomplete(client, engine):
    engine.text = CALL[:-16]
    assert ask(client).output[0].status == "incomplete"


def test_log_probabilities_are_of_the_text(client, engine):
    engine.text = f"<think>Hm.</think>\n\nGrößer 🚀, yes.\n{CALL}"
    (part,) = ask(client, **LOGPROBS).output[1].content
    spelled = b"".join(bytes(entry.bytes) for entry in part.logprobs)
    assert spelled.decode().lstrip() == part.text == "Größer 🚀, yes."
    assert {len(entry.top_logprobs) for entry in part.logprobs} == {2}
    events = [*ask(client, stream=True, **LOGPROBS)]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    tokens = [entry.token for event in deltas for entry in event.logprobs]
    assert tokens == [entry.token for entry in part.logprobs]


def test_too_many_log_probabilities_are_refused_by_the_fields_that_ask(client, monkeypatch):
    monkeypatch.setattr(calls, "MAX_LOGPROBS", 2)
    for name, fields in (("top_logprobs", {}), ("include", {"top_logprobs": 0})):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, **LOGPROBS | fields)
        assert caught.value.param == name
        assert f"{name} must ask for at most 2 log-probabilities" in caught.value.message


def test_a_conversation_goes_on_with_what_was_said(client, engine):
    engine.text = f"<think>Hm.</think>Let me see.\n{CALL}"
    answer = ask(client)
    output = {
        "type": "function_call_output",
        "call_id": answer.output[-1].call_id,
        "output": "wet",
    }
    items = [{"role": "user", "content": "hi"}, *answer.output, output]
    engine.text = "It is wet."
    assert ask(client, input=items).output_text == "It is wet."
    decode = engine.model.tokenizer.decode
    prompt = decode(engine.requests[1].prompt_token_ids, skip_special_tokens=False)
    called = '<tool_call>{"name": "weather", "arguments": {"place": "Köln {"}}</tool_call>'
    assert f"assistant\nLet me see.{called}<|im_end|>\n<|im_start|>tool\nwet<|im_end|>" in prompt


def test_an_engine_that_fails_ends_the_stream_truly(client, engine):
    engine.text, engine.fail_after = "Well, well, well.", 3
    *events, error, last = ask(client, stream=True)
    assert (error.type, error.message) == ("error", "the device is gone")
    assert last.type == "response.failed"
    assert (last.response.status, last.response.error.code) == ("failed", "server_error")
    assert last.response.error.message == "the device is gone"
    assert last.response.output[0].status == "incomplete"
    assert last.response.output_text == "".join(
        event.delta for event in events if event.type == "response.output_text.delta"
    )
    assert last.sequence_number == len(events) + 1
    with pytest.raises(openai.InternalServerError, match="the device is gone"):
        ask(client)
    with (
        client.responses.stream(model="test-model", input="hi") as stream,
        pytest.raises(RuntimeError, match="completed"),
    ):
        stream.get_final_response()


@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_before_the_first_token_is_an_answer(client, engine, stream):
    engine.refusal = "structured_outputs.json: #/not: not is not supported"
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, text={"format": form}, tools=[], stream=stream)
    assert caught.value.param == "text.format"
    assert "text.format.schema: #/not: not is not supported" in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_warnings_come_with_the_answer(client, engine, stream):
    engine.warnings = ["structured_outputs.json: #/not: not is not supported; it is left out"]
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    answer = ask(client, text={"format": form}, tools=[], stream=stream)
    answers = [e.response for e in answer if hasattr(e, "response")] if stream else [answer]
    for each in answers:
        (warning,) = each.model_dump()["minisgl_warnings"]
        assert warning.startswith("text.format.schema: #/not: ")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_aborts_its_request(thread, engine, stream):
    engine.delay, engine.text = 0.02, "word " * 200
    body = {"input": "hi", "stream": stream}
    with httpx.Client(timeout=0.3) as client:
        if stream:
            with client.stream("POST", f"{thread.url}/v1/responses", json=body) as response:
                next(response.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{thread.url}/v1/responses", json=body)
    assert eventually(lambda: engine.aborted and not engine.running)


def test_metrics_count_the_endpoint(thread, client, engine):
    ask(client)
    text = httpx.get(f"{thread.url}/metrics").text
    assert 'endpoint="responses"' in text
    assert httpx.get(f"{thread.url}/v1/responses/resp_1").status_code == 404
