"""What `make serve` gives: the bundled model behind the real server, asked by the real client."""

import json

import pytest

from minisgl.server.tokenizer import Tokenizer
from tests.server.served import ROOT, Served


@pytest.fixture(scope="module")
def served():
    server = Served()
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(served):
    with served.client() as client:
        yield client


def ask(client, question, **options):
    options = {"temperature": 0, "max_tokens": 80} | options
    return client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        **options,
    )


def text(answer):
    return answer.choices[0].message.content


def test_it_answers_with_sense(client):
    answer = ask(client, "What is paged attention?")
    assert "page" in text(answer)
    assert answer.choices[0].finish_reason == "stop"
    assert "42" in text(ask(client, "What is 17 + 25?"))
    assert "--port" in text(ask(client, "Which flag sets the port?"))


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0, "seed": 3}, {"stop": " the"}, {"max_tokens": 5}]
)
def test_streamed_text_equals_the_whole(client, options):
    question = "What does the radix cache do?"
    whole = ask(client, question, **options)
    *chunks, last = ask(
        client, question, stream=True, stream_options={"include_usage": True}, **options
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == text(whole)
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_stop_string_is_not_in_the_text(client):
    full = text(ask(client, "What does the radix cache do?"))
    stop = f" {full.split()[4]}"
    cut = text(ask(client, "What does the radix cache do?", stop=stop))
    assert cut == full.split(stop)[0]
    assert len(cut) < len(full)


def test_seeds_and_choices(client):
    options = {"temperature": 1.0, "seed": 11, "n": 3, "max_tokens": 40}
    first = ask(client, "Tell me a story about a fox.", **options)
    again = ask(client, "Tell me a story about a fox.", **options)
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) > 1


def test_logprobs_are_of_the_text(client):
    answer = ask(client, "What is 3 + 4?", logprobs=True, top_logprobs=4)
    content = answer.choices[0].logprobs.content
    spelled = b"".join(bytes(entry.bytes) for entry in content[:-1])  # the last ends the turn
    assert spelled.decode() == text(answer)
    for entry in content:
        assert entry.bytes == entry.top_logprobs[0].bytes
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )


def test_without_a_limit_the_context_ends_a_chat_and_16_tokens_a_completion(client):
    tokenizer = Tokenizer.from_directory(ROOT / "minisgl/assets/tiny")
    (served,) = client.models.list().data
    messages = [{"role": "user", "content": "Once upon a time "}]
    while len(tokenizer.encode_chat(messages)) < served.max_model_len - 80:
        messages[0]["content"] += "and then " * 10
    options = {"model": served.id, "temperature": 0, "extra_body": {"ignore_eos": True}}
    answer = client.chat.completions.create(messages=messages, **options)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(tokenizer.encode_chat(messages))
    assert answer.usage.total_tokens == served.max_model_len
    answer = client.completions.create(prompt="Once upon a time", **options)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16


def tool(name, about, **properties):
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    function = {"name": name, "description": about, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [
    tool("get_weather", "Get the current weather of a city.", city={"type": "string"}),
    tool("start_timer", "Start a timer.", minutes={"type": "integer"}),
]


@pytest.mark.parametrize("stream", [False, True])
def test_it_calls_a_tool_where_one_does_what_is_asked(client, stream):
    for question, name, arguments in (
        ("What is the weather in Paris?", "get_weather", {"city": "Paris"}),
        ("Start a timer of 25 minutes.", "start_timer", {"minutes": 25}),
    ):
        tools = TOOLS[:1] if name == "get_weather" else TOOLS
        whole = ask(client, question, tools=tools).choices[0]
        assert whole.finish_reason == "tool_calls"
        (call,) = whole.message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == (name, arguments)
        if stream:
            chunks = [c.choices[0] for c in ask(client, question, tools=tools, stream=True)]
            deltas = [delta for chunk in chunks for delta in chunk.delta.tool_calls or ()]
            assert "".join(d.function.name or "" for d in deltas) == name
            joined = "".join(d.function.arguments or "" for d in deltas)
            assert joined == call.function.arguments
            assert chunks[-1].finish_reason == "tool_calls"


def test_it_calls_no_tool_where_none_does_what_is_asked(client):
    for question, words in (
        ("What is paged attention?", "page"),
        ("What is 17 + 25?", "42"),
        ("Wake me at 7:30.", "not know"),
    ):
        answer = ask(client, question, tools=TOOLS[:1])
        assert answer.choices[0].finish_reason == "stop"
        assert not answer.choices[0].message.tool_calls
        assert words in text(answer)
    asked = ask(client, "What is 17 + 25?", tools=TOOLS, tool_choice="none")
    assert "42" in text(asked)


def test_the_wire_is_json_line_by_line(served):
    import httpx

    body = {"messages": [{"role": "user", "content": "What is prefill?"}], "stream": True}
    response = httpx.post(f"{served.wait_ready()}/v1/chat/completions", json=body, timeout=180)
    *events, last = [line for line in response.text.split("\n") if line]
    assert last == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events)
