"""Tools and reasoning over HTTP, against a model that says what the test tells it to."""

import json

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

from minisgl.server.app import LONG_TEXT
from minisgl.server.chat import parse_chat
from minisgl.server.tool_formats import TOOL_FORMATS
from tests.server.calls import USER
from tests.server.fake_engine import ServerThread
from tests.server.templates import HERMES, MISTRAL
from tests.server.tool_models import CALL, CLOCK, WEATHER, model, prompt


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


def ask(client, tools=(WEATHER, CLOCK), **options):
    return client.chat.completions.create(
        model="test-model", messages=USER, tools=[*tools], **options
    )


# ---- answers ---------------------------------------------------------------------------------


def test_a_call_in_a_whole_answer(client, engine):
    engine.text = f"Let me see.\n{CALL}"
    answer = ask(client)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    (call,) = choice.message.tool_calls
    assert call.type == "function"
    assert call.id.startswith("call_")
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"place": "Köln {"}
    tokens = engine.model.tokenizer.encode(engine.text, add_special_tokens=False)
    assert answer.usage.completion_tokens == len(tokens) + 1


def test_a_call_alone_has_no_content(client, engine):
    engine.text = CALL + CALL
    message = ask(client).choices[0].message
    assert message.content is None
    assert len({call.id for call in message.tool_calls}) == 2


def test_a_streamed_call_comes_as_openai_sends_it(client, engine):
    engine.text = f"Let me see.\n{CALL}\n{CALL}"
    *chunks, last = ask(client, stream=True, stream_options={"include_usage": True})
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content) == ("assistant", None)
    assert "".join(d.content or "" for d in deltas) == "Let me see."
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    for index in (0, 1):
        name, *fragments = (call for call in calls if call.index == index)
        assert (name.function.name, name.function.arguments, name.type) == (
            "weather",
            "",
            "function",
        )
        assert name.id
        assert {(f.id, f.function.name, f.type) for f in fragments} == {(None, None, None)}
        assert len(fragments) > 5
        joined = "".join(f.function.arguments for f in fragments)
        assert json.loads(joined) == {"place": "Köln {"}
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == [
        "tool_calls"
    ]
    assert last.usage.completion_tokens > 20


def test_the_clients_own_stream_helper_puts_it_together(client, engine):
    engine.text = f"<think>Which?</think>Let me see.\n{CALL}"
    with client.chat.completions.stream(
        model="test-model", messages=USER, tools=[WEATHER]
    ) as stream:
        kinds = {event.type for event in stream}
        choice = stream.get_final_completion().choices[0]
    assert {"content.delta", "tool_calls.function.arguments.delta"} <= kinds
    assert "tool_calls.function.arguments.done" in kinds
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    assert choice.message.reasoning_content == "Which?"
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"place": "Köln {"}


def test_the_clients_parse_helper_reads_calls(client, engine):
    engine.text = CALL
    completion = client.chat.completions.parse(model="test-model", messages=USER)
    assert completion.choices[0].message.tool_calls is None  # nobody gave tools
    assert completion.choices[0].message.content == CALL


@pytest.mark.parametrize(
    ("text", "options", "finish_reason"),
    [
        ("Nothing to call.", {}, "stop"),
        (CALL, {"max_tokens": 12}, "length"),
        (CALL, {"stop": "place"}, "stop"),
        (CALL, {"stop": "</tool_call>"}, "tool_calls"),
        (CALL[:-16], {}, "stop"),
        ("", {}, "stop"),
    ],
)
def test_finish_reasons_are_true(client, engine, text, options, finish_reason):
    engine.text = text
    whole = ask(client, **options).choices[0]
    assert whole.finish_reason == finish_reason
    assert whole.message.tool_calls != []
    *_, last = ask(client, stream=True, **options)
    assert last.choices[0].finish_reason == finish_reason


@pytest.mark.parametrize("tools", ["hermes", "mistral", "llama3_json"])
def test_a_frame_that_broke_off_is_no_text(tools):
    frame = TOOL_FORMATS[tools].frames[-1]
    start = frame.start + frame.lead
    whole = f'{start}weather{frame.middle}{{"place": "x"}}{frame.end}{frame.between}{frame.lead}w'
    server = ServerThread(model=model(tools=tools))
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        for size in range(len(whole)):
            server.engine.text = f"<think>Which?</think>{whole[:size]}"
            for parallel in (True, False):
                options = {"tool_choice": "required", "parallel_tool_calls": parallel}
                message = ask(client, **options).choices[0].message
                assert not message.content, message.content
                assert message.reasoning_content == "Which?"
                assert bool(message.tool_calls) == (size > len(f"{start}weather"))
    server.close()


def test_one_call_at_most_where_one_is_asked_for(client, engine):
    engine.text = CALL + CALL
    assert len(ask(client, parallel_tool_calls=False).choices[0].message.tool_calls) == 1
    assert len(ask(client, parallel_tool_calls=True).choices[0].message.tool_calls) == 2
    chunks = ask(client, parallel_tool_calls=False, stream=True)
    calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or ()]
    assert {call.index for call in calls} == {0}
    assert json.loads("".join(call.function.arguments for call in calls))


def test_nothing_is_called_where_nothing_may_be(client, engine):
    engine.text = CALL
    message = ask(client, tool_choice="none").choices[0].message
    assert (message.content, message.tool_calls) == (CALL, None)
    assert "weather" not in engine.model.tokenizer.decode(engine.requests[0].prompt_token_ids)


def test_each_choice_has_its_own_calls(client, engine):
    engine.text = CALL
    choices = ask(client, n=3).choices
    assert [len(choice.message.tool_calls) for choice in choices] == [1, 1, 1]
    names = {}
    for chunk in ask(client, n=3, stream=True):
        for call in chunk.choices[0].delta.tool_calls or ():
            if call.function.name:
                assert names.setdefault(chunk.choices[0].index, call.function.name) == "weather"
    assert sorted(names) == [0, 1, 2]


def test_log_probabilities_are_of_every_token(client, engine):
    engine.text = f"Yes. {CALL}"
    whole = ask(client, logprobs=True)
    chunks = [c.choices[0] for c in ask(client, logprobs=True, stream=True)]
    streamed = [entry for c in chunks if c.logprobs for entry in c.logprobs.content]
    assert len(streamed) == len(whole.choices[0].logprobs.content)
    assert len(streamed) == whole.usage.completion_tokens


@pytest.mark.parametrize("is_open", [False, True])
def test_reasoning_is_apart(client, engine, is_open):
    engine.text = f"{'' if is_open else '<think>'}Köln, I think.\n</think>\n\nSo be it."
    options = {"extra_body": {"chat_template_kwargs": {"thinking": is_open or None}}}
    message = ask(client, **options).choices[0].message
    assert (message.reasoning_content, message.content) == ("Köln, I think.", "So be it.")
    deltas = [c.choices[0].delta for c in ask(client, stream=True, **options)]
    thought = [d.reasoning_content for d in deltas if getattr(d, "reasoning_content", None)]
    assert "".join(thought) == "Köln, I think."
    assert len(thought) > 5
    assert "".join(d.content or "" for d in deltas) == "So be it."


def test_reasoning_that_the_prompt_has_closed_is_not_looked_for(client, engine):
    engine.text = "<think>as text</think> So."
    options = {"extra_body": {"chat_template_kwargs": {"thinking": False}}}
    message = ask(client, **options).choices[0].message
    assert message.content == engine.text
    assert getattr(message, "reasoning_content", None) is None


def test_reasoning_that_never_ends_is_all_there_is(client, engine):
    engine.text = f"<think>I might {CALL}"
    choice = ask(client).choices[0]
    assert (choice.message.content, choice.message.tool_calls) == (None, None)
    assert choice.message.reasoning_content == f"I might {CALL}"
    assert choice.finish_reason == "stop"


def test_a_mark_in_a_users_text_opens_nothing(client, engine):
    engine.text = "Fine."
    for template in (HERMES, "{{ messages[0].content }}"):
        served = model(template, tools=None)
        body = {"messages": [{"role": "user", "content": "What is <think>"}]}
        call = parse_chat(json.dumps(body).encode(), served)
        assert not call.form.is_open
    messages = [{"role": "user", "content": f"Repeat {CALL}<think>"}]
    answer = client.chat.completions.create(model="test-model", messages=messages, tools=[CLOCK])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Fine.", "stop")


def test_marks_may_be_special_tokens():
    marks = ["[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", "[OTHER]"]
    served = model(MISTRAL, "mistral", "mistral", marks)
    server = ServerThread(model=served)
    server.engine.text = '[THINK]hm[/THINK][OTHER]Yes.[TOOL_CALLS]weather[ARGS]{"place": "x"}'
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        choice = ask(client).choices[0]
        untooled = client.chat.completions.create(model="test-model", messages=USER)
    server.close()
    assert (choice.message.content, choice.message.reasoning_content) == ("Yes.", "hm")
    assert choice.message.tool_calls[0].function.arguments == '{"place": "x"}'
    assert untooled.choices[0].message.content == 'Yes.weather{"place": "x"}'
    assert len(choice.message.tool_calls[0].id) == 9
    said = [*USER, choice.message.model_dump(exclude_none=True)]
    said.append({"role": "tool", "tool_call_id": choice.message.tool_calls[0].id, "content": "wet"})
    assert "[TOOL_RESULTS]wet" in prompt({"messages": said, "tools": [WEATHER]}, served)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_stream_gives_what_the_whole_answer_gives(thread, data):
    thread.engine.reset()
    pieces = ["<think>", "</think>", CALL, CALL[:40], "<tool", " ", "\n", "Köln", "}", "🚀"]
    thread.engine.text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=6)))
    thread.engine.tokens_per_delta = data.draw(st.integers(1, 9))
    with OpenAI(base_url=f"{thread.url}/v1", api_key="none", max_retries=0) as client:
        whole = ask(client).choices[0]
        with client.chat.completions.stream(
            model="test-model", messages=USER, tools=[WEATHER]
        ) as stream:
            streamed = stream.get_final_completion().choices[0]
    assert streamed.finish_reason == whole.finish_reason
    assert (streamed.message.content or None) == (whole.message.content or None)
    thoughts = [getattr(m.message, "reasoning_content", None) for m in (whole, streamed)]
    assert thoughts[0] == thoughts[1]
    calls = [
        [(c.function.name, c.function.arguments) for c in m.message.tool_calls or ()]
        for m in (whole, streamed)
    ]
    assert calls[0] == calls[1]


def test_a_conversation_with_calls_goes_through_the_template(client, engine):
    engine.text = CALL
    message = ask(client).choices[0].message
    answered = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "wet"}
    engine.text = "It is wet."
    client.chat.completions.create(
        model="test-model", messages=[*USER, message, answered], tools=[WEATHER]
    )
    decode = engine.model.tokenizer.decode
    said = decode(engine.requests[1].prompt_token_ids, skip_special_tokens=False)
    assert '<tools>\n{"type": "function", "function": {"name": "weather", "description"' in said
    assert '<tool_call>{"name": "weather", "arguments": {"place": "Köln {"}}</tool_call>' in said
    assert "<|im_start|>tool\nwet<|im_end|>" in said


def test_refusals_reach_the_client(client):
    with pytest.raises(openai.BadRequestError, match=r"tools\[0\].function.name") as caught:
        ask(client, tools=[{"type": "function", "function": {"name": "no name"}}])
    assert caught.value.param == "tools[0].function.name"


@pytest.mark.parametrize("stream", [False, True])
def test_an_argument_may_be_long(client, engine, stream):
    said = "Köln }] <tool_call> " * 2_500
    assert len(said) > LONG_TEXT
    engine.text = (
        f'<tool_call>{{"name": "weather", "arguments": {{"place": "{said}"}}}}</tool_call>'
    )
    engine.tokens_per_delta = 100
    if stream:
        chunks = [c.choices[0].delta.tool_calls or [] for c in ask(client, stream=True)]
        arguments = "".join(call.function.arguments for calls in chunks for call in calls)
    else:
        arguments = ask(client).choices[0].message.tool_calls[0].function.arguments
    assert json.loads(arguments) == {"place": said}
