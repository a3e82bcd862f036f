"""Chat and completions through the real `openai` client, with a fake engine behind them."""

import json

import httpx
import openai
import pytest

from minisgl.core.request import SamplingParams
from minisgl.server import app, calls
from tests.server.calls import MODEL, USER, chat, complete, sse
from tests.server.fake_engine import CACHED, CONTEXT

# ---- chat ---------------------------------------------------------------------------------------


def test_chat(client, engine):
    answer = chat(client)
    (choice,) = answer.choices
    prompt = engine.model.tokenizer.encode_chat(USER)
    assert choice.message.content == engine.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == MODEL
    assert engine.requests[0].prompt_token_ids == prompt
    usage = answer.usage
    assert usage.prompt_tokens == len(prompt)
    assert usage.completion_tokens == len(engine.ids(engine.requests[0])[0])
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == CACHED


def test_the_engine_is_told_where_the_tokenizer_ends_a_text(client, engine):
    chat(client)
    complete(client, ["a", "b"])
    eos = engine.model.tokenizer.eos_token_id
    assert [request.eos_token_id for request in engine.requests] == [eos] * 3


@pytest.mark.parametrize("ask", [chat, complete])
def test_each_choice_of_a_stream_is_warned_once(client, engine, ask):
    engine.text, engine.warnings = "🚀 up", ["#/not: it is left out"]  # a token shows nothing yet
    told = []
    for chunk in ask(client, n=2, stream=True):
        if "minisgl_warnings" in chunk.model_dump():
            assert chunk.minisgl_warnings == engine.warnings
            told.append(chunk.choices[0].index)
    assert sorted(told) == [0, 1]


@pytest.mark.parametrize("tokens_per_delta", [1, 3, 100])
@pytest.mark.parametrize("stop", [None, "größ", ["ld", "xx"]])
def test_streamed_chat_equals_the_whole(client, engine, stop, tokens_per_delta):
    whole = chat(client, stop=stop)
    engine.tokens_per_delta = tokens_per_delta
    chunks = list(chat(client, stop=stop, stream=True, stream_options={"include_usage": True}))
    *body, last = chunks
    assert "".join(c.choices[0].delta.content or "" for c in body) == (
        whole.choices[0].message.content
    )
    assert body[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in body] == [None] * (len(body) - 1) + ["stop"]
    assert body[-1].choices[0].delta.content is None
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({c.id for c in chunks}) == len({c.created for c in chunks}) == 1
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(c.usage is None for c in body)


def test_the_stream_on_the_wire(server):
    body = {"messages": USER, "stream": True, "max_tokens": 2}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, last = sse(response)
    assert last == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert [sorted(chunk) for chunk in chunks] == [
        ["choices", "created", "id", "model", "object", "system_fingerprint"]
    ] * len(chunks)
    assert chunks[0]["choices"] == [
        {
            "index": 0,
            "delta": {"role": "assistant", "content": "", "refusal": None},
            "logprobs": None,
            "finish_reason": None,
        }
    ]
    assert chunks[-1]["choices"] == [
        {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}
    ]


def test_length_ends_at_max_tokens(client, engine):
    for options in ({"max_tokens": 4}, {"max_completion_tokens": 4}):
        answer = chat(client, **options)
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 4
        expected = engine.model.tokenizer.decode(engine.ids(engine.requests[-1])[0])
        assert answer.choices[0].message.content == expected


def test_stop_strings_end_and_abort(client, engine):
    answer = chat(client, stop=["no", ", gr"])
    assert answer.choices[0].message.content == "Hello"
    assert answer.choices[0].finish_reason == "stop"
    ids = engine.ids(engine.requests[0])[0]
    used = answer.usage.completion_tokens
    assert ", gr" in engine.model.tokenizer.decode(ids[:used])
    assert ", gr" not in engine.model.tokenizer.decode(ids[: used - 1])
    assert engine.aborted == [(engine.requests[0].id, 0)]


def test_n_choices_each_with_its_own_stop(client, engine):
    answer = chat(client, n=3, stop="world")
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert {c.message.content for c in answer.choices} == {"Hello, größer 🚀 "}
    assert answer.usage.prompt_tokens == len(engine.requests[0].prompt_token_ids)
    assert answer.usage.completion_tokens % 3 == 0
    assert answer.usage.prompt_tokens_details.cached_tokens == CACHED
    texts = ["", "", ""]
    for chunk in chat(client, n=3, stop="world", stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert set(texts) == {"Hello, größer 🚀 "}


def test_chat_logprobs(client, engine):
    answer = chat(client, logprobs=True, top_logprobs=2, max_tokens=30)
    content = answer.choices[0].logprobs.content
    ids = engine.ids(engine.requests[0])[0]
    tokenizer = engine.model.tokenizer
    assert len(content) == answer.usage.completion_tokens == len(ids)
    assert [bytes(entry.bytes) for entry in content] == [tokenizer.token_bytes(i) for i in ids]
    assert [entry.logprob for entry in content] == [-0.5 - i for i in range(len(ids))]
    assert [len(entry.top_logprobs) for entry in content] == [2] * len(ids)
    assert content[3].top_logprobs[1].logprob == -4.5
    assert bytes(content[3].top_logprobs[1].bytes) == tokenizer.token_bytes(ids[3] + 1)
    streamed = [
        entry
        for chunk in chat(client, logprobs=True, top_logprobs=2, max_tokens=30, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == content


def test_logprobs_without_top(client):
    content = chat(client, logprobs=True).choices[0].logprobs.content
    assert [entry.top_logprobs for entry in content] == [[]] * len(content)


def test_every_sampling_field_reaches_the_engine(client, engine):
    chat(
        client,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        logit_bias={"5": 1.5},
        seed=7,
        max_tokens=9,
        stop="q",
        extra_body={
            "top_k": 11,
            "min_p": 0.05,
            "min_tokens": 2,
            "repetition_penalty": 1.1,
            "stop_token_ids": [3],
            "ignore_eos": True,
            "priority": 5,
            "cache_salt": "tenant",
        },
    )
    (request,) = engine.requests
    assert request.params == SamplingParams(
        temperature=0.5,
        top_p=0.9,
        presence_penalty=0.1,
        frequency_penalty=-0.2,
        logit_bias=((5, 1.5),),
        seed=7,
        max_tokens=9,
        stop=("q",),
        top_k=11,
        min_p=0.05,
        min_tokens=2,
        repetition_penalty=1.1,
        stop_token_ids=(3,),
        ignore_eos=True,
    )
    assert (request.priority, request.cache_salt) == (5, "tenant")


def test_nothing_given_is_left_to_the_engine(client, engine):
    chat(client)
    chat(client, temperature=1, top_p=1, extra_body={"top_k": 0, "min_p": 0})
    silent, explicit = (request.params for request in engine.requests)
    assert (silent.temperature, silent.top_p, silent.n, silent.max_tokens) == (None, None, 1, None)
    assert 0 <= silent.seed < 2**64
    assert (explicit.temperature, explicit.top_p) == (1.0, 1.0)
    assert (explicit.top_k, explicit.min_p, explicit.repetition_penalty) == (0, 0.0, None)


def test_models_say_what_holds_where_a_request_says_nothing(client):
    (model,) = client.models.list().data
    assert model.sampling_defaults == {
        "temperature": 0.6,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }


def test_seeds_are_kept_and_differ_where_none_is_given(client, engine):
    for seed in (0, -1, None, None):
        chat(client, seed=seed)
    seeds = [request.params.seed for request in engine.requests]
    assert seeds[:2] == [0, 2**64 - 1]
    assert seeds[2] != seeds[3]


def test_roles_and_content_parts(client, engine):
    client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b", "refusal": None},
            {
                "role": "user",
                "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}],
            },
        ],
    )
    tokenizer = engine.model.tokenizer
    text = tokenizer.decode(engine.requests[0].prompt_token_ids, skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc\nd<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


# ---- completions --------------------------------------------------------------------------------


def test_completion(client, engine):
    answer = complete(client, max_tokens=64)
    assert answer.object == "text_completion"
    assert answer.choices[0].text == engine.text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert engine.requests[0].prompt_token_ids == engine.model.tokenizer.encode("Once")


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("ab", 1), ([40, 41], 1), (["ab", "cde"], 2), ([[40], [41, 42], [43]], 3)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_all_kinds_of_prompts(client, engine, prompt, count, stream):
    options = {"n": 2, "max_tokens": 3, "logprobs": 1}
    answer = complete(client, prompt, stream=stream, **options)
    if stream:
        texts = [""] * (2 * count)
        for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        assert [choice.index for choice in answer.choices] == list(range(2 * count))
        texts = [choice.text for choice in answer.choices]
        prompts = [len(request.prompt_token_ids) for request in engine.requests]
        assert answer.usage.prompt_tokens == sum(prompts)
        assert answer.usage.completion_tokens == 6 * count
    assert len(texts) == 2 * count
    assert len(set(texts)) == 1
    assert len(engine.requests) == count
    encode = engine.model.tokenizer.encode
    given = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    expected = [encode(p) if isinstance(p, str) else p for p in given]
    got = sorted((request.id, request.prompt_token_ids) for request in engine.requests)
    assert [ids for _, ids in got] == expected


def test_completion_logprobs_in_the_old_shape(client, engine):
    engine.text = "a🚀 b"
    answer = complete(client, logprobs=2)
    found = answer.choices[0].logprobs
    ids, tokenizer = engine.ids(engine.requests[0])[0], engine.model.tokenizer
    spelled = [tokenizer.token_bytes(i) for i in ids]
    assert len(found.tokens) == len(ids) == answer.usage.completion_tokens
    for token, written in zip(found.tokens, spelled, strict=True):
        if token.startswith("bytes:"):
            assert bytes.fromhex(token.removeprefix("bytes:").replace("\\x", "")) == written
        else:
            assert token.encode() == written
    assert found.token_logprobs == [-0.5 - i for i in range(len(ids))]
    assert all(token in top for token, top in zip(found.tokens, found.top_logprobs, strict=True))
    text = answer.choices[0].text
    whole = [offset for token, offset in zip(found.tokens, found.text_offset, strict=True)]
    assert whole == sorted(whole)
    assert whole[0] == 0
    assert whole[-1] == len(text)  # the end of turn adds nothing
    streamed = complete(client, logprobs=2, stream=True)
    offsets = [o for chunk in streamed for o in chunk.choices[0].logprobs.text_offset]
    assert offsets == found.text_offset


@pytest.mark.parametrize("stream", [False, True])
def test_echo_repeats_the_prompt_with_its_logprobs(client, engine, stream):
    answer = complete(client, "Once", echo=True, logprobs=1, max_tokens=2, stream=stream)
    chunks = list(answer) if stream else [answer]
    ids = engine.requests[0].prompt_token_ids + engine.ids(engine.requests[0])[0]
    tokenizer = engine.model.tokenizer
    assert "".join(c.choices[0].text for c in chunks) == "Once" + tokenizer.decode(ids[-2:])
    found = [c.choices[0].logprobs for c in chunks]
    values = [value for entry in found for value in entry.token_logprobs]
    assert len(values) == len(ids)
    assert values[0] is None
    assert values[1:-2] == [-100.5 - i for i in range(1, len(ids) - 2)]
    assert values[-2:] == [-0.5, -1.5]
    tokens = [token for entry in found for token in entry.tokens]
    assert "".join(tokens).startswith("Once")
    text = "".join(c.choices[0].text for c in chunks)
    offsets = [offset for entry in found for offset in entry.text_offset]
    for token, begin in zip(tokens, offsets, strict=True):
        assert text[begin:].startswith(token)
    assert offsets == sorted(offsets)
    assert offsets[-2] == len("Once")
    tops = [top for entry in found for top in entry.top_logprobs]
    assert tops[0] is None


def test_an_answer_is_the_same_where_it_is_written(client, engine, monkeypatch):
    """A long one is written choice by choice, off the event loop."""
    fields = {"echo": True, "logprobs": 2, "max_tokens": 4, "seed": 1}
    written = []
    for least in (1, 10**6):
        monkeypatch.setattr(app, "LONG_ANSWER", least)
        answer = complete(client, ["Once", "größer", "a"], **fields)
        written.append([choice.model_dump() for choice in answer.choices])
    assert written[0] == written[1]
    assert [choice["index"] for choice in written[0]] == [0, 1, 2]


def test_an_answer_that_outgrows_its_limit_is_refused_unless_it_is_streamed(
    client, engine, monkeypatch
):
    monkeypatch.setattr(calls, "MAX_LOGPROBS", 12)  # 4 tokens with 2 likeliest
    fields = {"logprobs": True, "top_logprobs": 2}
    assert chat(client, **fields, max_tokens=4).choices[0].finish_reason == "length"
    with pytest.raises(
        openai.BadRequestError, match=r"at most 12 log-probabilities.*got at least 15"
    ):
        chat(client, **fields)
    assert engine.aborted
    assert [*chat(client, **fields, stream=True)]


def test_echo_of_token_ids(client, engine):
    ids = engine.model.tokenizer.encode("größer")
    answer = complete(client, ids, echo=True, max_tokens=1)
    assert answer.choices[0].text.startswith("größer")
    assert answer.usage.prompt_tokens == len(ids)


def test_best_of_n_is_accepted_where_it_asks_for_nothing(client):
    assert len(complete(client, n=2, best_of=2).choices) == 2


@pytest.mark.parametrize(
    ("prompt", "fields", "limits"),
    [
        ("Once", {}, [16]),
        ("Once", {"max_tokens": None}, [16]),
        ("Once", {"max_tokens": 3}, [3]),
        ("Once", {"min_tokens": 20}, [20]),
        ([[5] * 90, [5] * CONTEXT, [5]], {}, [6, 1, 16]),
    ],
)
def test_a_completion_without_max_tokens_has_16_or_what_fits(server, prompt, fields, limits):
    body = {"prompt": prompt, "ignore_eos": True} | fields
    answer = httpx.post(f"{server.url}/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == sum(limits)
    assert {choice["finish_reason"] for choice in answer["choices"]} == {"length"}
    found = sorted((request.id, request.params.max_tokens) for request in server.engine.requests)
    assert [limit for _, limit in found] == limits


def test_a_chat_without_max_tokens_runs_to_the_end_of_the_context(server):
    body = {"messages": USER, "ignore_eos": True}
    usage = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["usage"]
    assert usage["total_tokens"] == CONTEXT


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_usage_in_every_chunk_where_it_is_asked_for(server, path):
    options = {"include_usage": True, "continuous_usage_stats": True}  # as guidellm sends them
    said = {"prompt": "Once"} if path == "completions" else {"messages": USER}
    body = said | {"stream": True, "stream_options": options, "max_tokens": 5}
    *events, last = sse(httpx.post(f"{server.url}/v1/{path}", json=body))
    assert last == "[DONE]"
    usages = [json.loads(event)["usage"] for event in events]
    (prompt,) = {usage["prompt_tokens"] for usage in usages}
    assert prompt == len(server.engine.requests[0].prompt_token_ids)
    counts = [usage["completion_tokens"] for usage in usages]
    assert counts == sorted(counts)
    assert set(counts) == {1, 2, 3, 4, 5}
    assert json.loads(events[-1])["choices"] == []


def test_an_assistant_that_said_nothing_is_an_empty_message(server):
    silent = {"role": "assistant", "content": None}
    for message in (silent, silent | {"content": ""}):
        body = {"messages": [*USER, message, *USER], "max_tokens": 1}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 200
    first, second = server.engine.requests
    assert first.prompt_token_ids == second.prompt_token_ids
