"""Tools and reasoning over HTTP, against a model that says what the test tells it to."""

import contextlib
import dataclasses
import json

import openai
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import OpenAI

from minisgl.core.executor import Limits
from minisgl.server.answer import REASONING_FORMATS
from minisgl.server.body import ApiError
from minisgl.server.chat_template import ChatTemplate
from minisgl.server.openai import parse_chat
from minisgl.server.tokenizer import Tokenizer
from minisgl.server.tool_formats import TOOL_FORMATS
from minisgl.server.tools import MAX_CALLS, MAX_TOOLS
from tests.server import small_tokenizers
from tests.server.calls import USER
from tests.server.fake_engine import CONFIG, VOCAB, ServerThread, served_model

HERMES = """{%- if tools %}<|im_start|>system
<tools>{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}</tools><|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if thinking %}<think>
{% endif %}{% endif %}"""  # noqa: E501

# As Mistral's: an id has nine characters, a text beside calls is left out.
MISTRAL = """{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}
{%- if m.tool_calls is defined %}[TOOL_CALLS]{{ m.tool_calls | tojson }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('an id has 9 characters') }}{% endif %}
{{- '[TOOL_RESULTS]' + m.content + m.tool_call_id }}
{%- else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How it is outside.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Köln {"}}\n</tool_call>'
CALLED = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}


def model(template=HERMES, tools="hermes", reasoning="think", marks=()):
    backend = tokenizers.Tokenizer.from_str(small_tokenizers.byte_level().to_str())
    backend.add_special_tokens([*marks])
    return dataclasses.replace(
        served_model(),
        tokenizer=Tokenizer(backend, CONFIG, ChatTemplate(template)),
        limits=Limits(
            num_pages=2**14, page_size=1, max_rows=8, max_context=2**14, vocab_size=VOCAB
        ),
        tool_format=TOOL_FORMATS.get(tools),
        reasoning=REASONING_FORMATS.get(reasoning),
    )


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


def prompt(body, served=None):
    """The prompt that the body becomes."""
    served = served or model()
    call = parse_chat(json.dumps(body).encode(), served)
    return served.tokenizer.decode(call.requests[0].prompt_token_ids, skip_special_tokens=False)


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
    options = {"extra_body": {"chat_template_kwargs": {"thinking": is_open}}}
    message = ask(client, **options).choices[0].message
    assert (message.reasoning_content, message.content) == ("Köln, I think.", "So be it.")
    deltas = [c.choices[0].delta for c in ask(client, stream=True, **options)]
    thought = [d.reasoning_content for d in deltas if getattr(d, "reasoning_content", None)]
    assert "".join(thought) == "Köln, I think."
    assert len(thought) > 5
    assert "".join(d.content or "" for d in deltas) == "So be it."


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


# ---- conversations ---------------------------------------------------------------------------


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


def test_what_is_no_business_of_the_models_is_left_out():
    tool = {"type": "function", "function": {"name": "f", "strict": False, "description": None}}
    assert '{"type": "function", "function": {"name": "f"}}' in prompt(
        {"messages": USER, "tools": [tool], "parallel_tool_calls": None, "tool_choice": None}
    )


def test_content_beside_calls_may_be_left_out_by_a_template():
    messages = [*USER, {"role": "assistant", "content": "I look.", "tool_calls": [CALLED]}]
    assert "[TOOL_CALLS]" in prompt({"messages": messages}, model(MISTRAL, "mistral"))


def refusal(served=None, **body):
    with pytest.raises(ApiError) as caught:
        prompt({"messages": USER} | body, served)
    error = caught.value.body["error"]
    assert caught.value.status == 400
    assert len(error["message"]) < 500
    return error["param"], error["message"]


def function(**changes):
    return {"type": "function", "function": {"name": "f"} | changes}


def named(name):
    return {"type": "function", "function": {"name": name}}


def said(*messages):
    return {"messages": [*USER, *messages]}


ASSISTANT = {"role": "assistant", "content": None, "tool_calls": [CALLED]}
ANSWER = {"role": "tool", "tool_call_id": "1", "content": "x"}


def calling(**changes):
    return said({"role": "assistant", "tool_calls": [CALLED | changes]})


def called(**changes):
    return calling(function=CALLED["function"] | changes)


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].custom", "not a field"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", 'got "web_search"'),
        ({"tools": [{"type": "x", "function": {}}]}, "tools[0].type", 'got "x"'),
        ({"tools": [CLOCK, function(name="a b")]}, "tools[1].function.name", 'got "a b"'),
        ({"tools": [function(name="")]}, "tools[0].function.name", 'got ""'),
        ({"tools": [function(name="x" * 65)]}, "tools[0].function.name", "{1,64}"),
        ({"tools": [function(name="f\n")]}, "tools[0].function.name", '"f\\n"'),
        ({"tools": [function(name="größe")]}, "tools[0].function.name", "größe"),
        ({"tools": [function(), function()]}, "tools[1].function.name", '"f" twice'),
        ({"tools": [function(parameters=[])]}, "tools[0].function.parameters", "object"),
        ({"tools": [function(strict=1)]}, "tools[0].function.strict", "got 1"),
        ({"tools": [function(returns={})]}, "tools[0].function.returns", "not a field"),
        ({"tools": {}}, "tools", "got {}"),
        ({"tools": [5]}, "tools[0]", "got 5"),
        (
            {"tools": [function(name=f"f{i}") for i in range(MAX_TOOLS + 1)]},
            "tools",
            f"at most {MAX_TOOLS}, got {MAX_TOOLS + 1}",
        ),
        ({"tools": [CLOCK] * 10_001}, None, "arrays and objects, got"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "got none"),
        ({"tools": [CLOCK], "tool_choice": "maybe"}, "tool_choice", '"maybe"'),
        ({"tools": [CLOCK], "tool_choice": {"type": "function"}}, "tool_choice.function", "is req"),
        ({"tools": [CLOCK], "tool_choice": named("f")}, "tool_choice.function.name", '"f"'),
        ({"tools": [CLOCK], "tool_choice": named(5)}, "tool_choice.function.name", "5"),
        ({"tools": [CLOCK], "tool_choice": named("clock") | {"x": 1}}, "tool_choice.x", "no"),
        ({"tools": [CLOCK], "tool_choice": "required", "ignore_eos": True}, "ignore_eos", "True"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls", '"no"'),
        (calling(id=5), "messages[1].tool_calls[0].id", "got 5"),
        (
            said({"role": "assistant", "tool_calls": [{"type": "function", "function": {}}]}),
            "messages[1].tool_calls[0].id",
            "required",
        ),
        (calling(type="custom"), "messages[1].tool_calls[0].type", "custom"),
        (called(name="a b"), "messages[1].tool_calls[0].function.name", '"a b"'),
        (called(arguments={}), "messages[1].tool_calls[0].function.arguments", "{}"),
        (called(arguments="[1]"), "messages[1].tool_calls[0].function.arguments", "[1]"),
        (called(arguments='{"a'), "messages[1].tool_calls[0].function.arguments", "JSON object"),
        (called(arguments='{"a":' * 9999), "messages[1].tool_calls[0].function.arguments", "JSON"),
        (called(arguments="x" * 10**6), "messages[1].tool_calls[0].function.arguments", "1000002"),
        (
            said({"role": "assistant", "tool_calls": [CALLED] * (MAX_CALLS + 1)}),
            "messages[1].tool_calls",
            f"at most {MAX_CALLS}",
        ),
        (said({"role": "user", "content": "x"} | {"tool_calls": [CALLED]}),
         "messages[1].tool_calls", "needs the role assistant"),
        (said({"role": "user", "content": "x", "tool_call_id": "1"}),
         "messages[1].tool_call_id", "needs the role tool"),
        (said(ANSWER), "messages[1].tool_call_id", 'of which there are 0; got "1"'),
        (said(ASSISTANT, ANSWER | {"tool_call_id": "2"}), "messages[2].tool_call_id", 'got "2"'),
        (said(ASSISTANT, ANSWER | {"tool_call_id": None}), "messages[2].tool_call_id", "null"),
        (said(ASSISTANT, *USER, ANSWER), "messages[3].tool_call_id", "there are 0"),
        (said(ASSISTANT, {"role": "tool", "tool_call_id": "1"}), "messages[2].content", "required"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(body, param, words):
    assert refusal(**body)[0] == param
    assert words in refusal(**body)[1]


def test_answers_may_come_in_any_order():
    two = ASSISTANT | {"tool_calls": [CALLED, CALLED | {"id": "2", "index": 1}]}
    assert prompt(said(two, ANSWER | {"tool_call_id": "2"}, ANSWER))
    assert prompt(called(arguments=""))


def test_tools_need_a_model_that_can_call_them():
    for served in (model(tools=None), model("{{ messages[0].content }}")):
        param, _ = refusal(served, tools=[CLOCK])
        assert param == "tools"
    assert (
        "--tool-call-parser, one of ['qwen3_coder'," in refusal(model(tools=None), tools=[CLOCK])[1]
    )
    plain = model(small_tokenizers.CHAT_TEMPLATE)
    assert refusal(plain, **said(ASSISTANT, ANSWER))[0] == "messages"
    assert prompt({"messages": USER, "tools": [CLOCK], "tool_choice": "none"}, model(tools=None))


def test_forms_that_cannot_be_held_to_a_schema_refuse_what_needs_it():
    served = model(tools="pythonic")
    for body, param in (
        ({"tools": [CLOCK], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": named("clock")}, "tool_choice"),
        ({"tools": [function(strict=True)]}, "tools"),
    ):
        assert refusal(served, **body)[0] == param
        assert "as one of ['hermes', 'mistral', 'llama3_json']" in refusal(served, **body)[1]
    assert prompt({"messages": USER, "tools": [CLOCK]}, served)


def test_schemas_nested_as_deep_as_can_be_are_answered():
    for depth in (50, 400, 700, 900, 2_000, 100_000):
        nested = '{"a":' * depth + "{}" + "}" * depth
        content = (
            '{"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function", '
            f'"function": {{"name": "f", "parameters": {nested}}}}}]}}'
        )
        with contextlib.suppress(ApiError):
            assert parse_chat(content.encode(), model()).requests
            assert depth < 1_000


def test_refusals_reach_the_client(client):
    with pytest.raises(openai.BadRequestError, match=r"tools\[0\].function.name") as caught:
        ask(client, tools=[function(name="no name")])
    assert caught.value.param == "tools[0].function.name"


def test_a_structured_answer_and_tools_do_not_go_together():
    strict = function(strict=True)
    form = {"type": "json_object"}
    for tools in ([CLOCK], [strict]):
        assert refusal(tools=tools, response_format=form)[0] == "response_format"
        assert prompt({"messages": USER, "tools": tools, "response_format": {"type": "text"}})
    body = {"messages": USER, "tools": [strict], "response_format": form, "tool_choice": "none"}
    call = parse_chat(json.dumps(body).encode(), model())
    assert (call.form.tools, call.structured_by) == (None, "response_format")
    body = {"messages": USER, "tools": [strict], "tool_choice": "required"}
    assert parse_chat(json.dumps(body).encode(), model()).structured_by == "tools"
    assert parse_chat(json.dumps({"messages": USER}).encode(), model()).structured_by is None
