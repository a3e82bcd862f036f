"""What is wrong with a body is said with the field, the limit and the value, in OpenAI's shape."""

import dataclasses
import json
import re
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisgl.core.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from minisgl.server.body import ApiError
from minisgl.server.chat import parse_chat
from minisgl.server.chat_template import ChatTemplate
from minisgl.server.completions import MAX_PROMPTS, parse_completion
from minisgl.server.tokenizer import Tokenizer
from tests.server import small_tokenizers
from tests.server.fake_engine import CONFIG, CONTEXT, VOCAB, served_model

MODEL = served_model()
USER = {"role": "user", "content": "hi"}
TEXT = {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}}
TOOL = {"type": "function", "function": {"name": "f"}}

# Its chat template refuses with words of the body's.
REFUSING = dataclasses.replace(
    MODEL,
    tokenizer=Tokenizer(
        small_tokenizers.byte_level(),
        CONFIG,
        ChatTemplate("{% if refuse %}{{ raise_exception('no ' + refuse) }}{% endif %}hi"),
    ),
)


def refusal(parse, body, model=MODEL):
    with pytest.raises(ApiError) as caught:
        parse(body if isinstance(body, bytes) else json.dumps(body).encode(), model)
    error = caught.value.body["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["type"] == "invalid_request_error"
    return caught.value.status, error


def chat_refusal(**fields):
    status, error = refusal(parse_chat, {"messages": [USER]} | fields)
    assert status == 400
    return error


def completion_refusal(**fields):
    status, error = refusal(parse_completion, {"prompt": "hi"} | fields)
    assert status == 400
    return error


UNSUPPORTED_CHAT = {
    "audio": {"voice": "alloy", "format": "wav"},
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "modalities": ["text", "audio"],
    "prediction": {"type": "content", "content": "x"},
    "reasoning_effort": "low",
    "service_tier": "flex",
    "store": True,
    "verbosity": "low",
    "web_search_options": {},
}
UNKNOWN = {
    "best_of": 2,
    "include_stop_str_in_output": True,
    "length_penalty": 1.0,
    "logits_processors": [],
    "prompt_logprobs": 1,
    "skip_special_tokens": False,
    "use_beam_search": True,
}


@pytest.mark.parametrize("name", UNSUPPORTED_CHAT)
def test_an_unsupported_field_is_refused_by_name(name):
    error = chat_refusal(**{name: UNSUPPORTED_CHAT[name]})
    assert error["param"] == name
    assert error["message"].startswith(f"{name} is not supported, got ")
    assert error["code"] == "unsupported_parameter"


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_field_is_refused_by_name(name):
    error = chat_refusal(**{name: UNKNOWN[name]})
    assert error["param"] == name
    assert error["code"] == "unknown_parameter"


@pytest.mark.parametrize(
    ("parse", "body"),
    [(parse_chat, {"messages": [USER]}), (parse_completion, {"prompt": "hi"})],
)
def test_a_misspelt_field_suggests_the_nearest(parse, body):
    _, error = refusal(parse, body | {"max_token": 5})
    assert "did you mean max_tokens?" in error["message"]


def test_priority_needs_its_policy():
    model = dataclasses.replace(MODEL, has_priorities=False)
    body = {"messages": [USER], "priority": 1}
    with pytest.raises(ApiError, match="--schedule-policy priority, got 1"):
        parse_chat(json.dumps(body).encode(), model)
    assert parse_chat(json.dumps(body | {"priority": 0}).encode(), model).requests


def test_more_tokens_at_least_than_fit_are_refused():
    error = chat_refusal(min_tokens=2**31 - 1)
    assert "min_tokens asks for 2147483647" in error["message"]


def test_the_limit_of_the_output_is_named_as_the_body_names_it():
    for name in ("max_tokens", "max_completion_tokens"):
        error = chat_refusal(min_tokens=5, **{name: 4})
        assert error["message"] == f"min_tokens must be at most {name} (4), got 5"
        assert error["param"] == "min_tokens"


def test_template_arguments_cannot_name_the_method_itself():
    content = json.dumps({"messages": [USER], "chat_template_kwargs": {"self": 1}})
    assert parse_chat(content.encode(), MODEL).requests


def test_deep_nesting_is_refused():
    with pytest.raises(ApiError, match="nested too deeply"):
        parse_chat(b"[" * 20_000, MODEL)
    for depth in range(900, 1000):  # what can just be read can hardly be shown
        tools = b"[" * depth + b"]" * depth
        with pytest.raises(ApiError, match=r"tools\[0\]: expected `object`|nested too deeply"):
            parse_chat(b'{"messages": [], "tools": ' + tools + b"}", MODEL)


def test_suffix_is_refused():
    assert completion_refusal(suffix="end")["param"] == "suffix"


@pytest.mark.parametrize(
    "fields",
    [
        dict.fromkeys(UNSUPPORTED_CHAT),
        {"tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {"tools": None, "parallel_tool_calls": False, "no_field_of_ours": None},
        {"tool_choice": "none", "tools": [TOOL]},
        {"function_call": "none", "functions": [TOOL["function"]]},
        {"messages": [USER, {"role": "assistant", "content": None}, USER]},
        {"messages": [USER, {"role": "assistant"}, USER]},
        {"messages": [USER | {"cache_control": {"type": "ephemeral"}, "weight": None}]},
        {"messages": [{"role": "user", "content": [TEXT | {"annotations": [], "id": None}]}]},
        {"stream_options": {"include_usage": False}},
        {"stream": True, "stream_options": {"include_usage": None, "else": None}},
        {"top_logprobs": 0, "logprobs": False},
        {"tool_choice": "none", "functions": [], "function_call": "none"},
        {"response_format": {"type": "text"}, "modalities": ["text"], "verbosity": "medium"},
        {"store": False, "service_tier": "auto"},
        {"user": "u", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k"},
        {"temperature": None, "top_p": None, "n": None, "stop": None, "max_tokens": None},
        {"logprobs": False, "top_logprobs": None, "logit_bias": {}, "seed": None},
        {"stream": False, "stream_options": None},
        {"stream": True, "stream_options": {"include_obfuscation": False}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"max_tokens": 5, "max_completion_tokens": 5},
        {"top_k": -1},
    ],
)
def test_values_that_ask_for_nothing_are_accepted(fields):
    parse_chat(json.dumps({"messages": [USER]} | fields).encode(), MODEL)


OUT_OF_RANGE = {
    "temperature": (-0.1, "at least 0.0 and at most 100.0"),
    "top_p": (1.5, "at most 1.0"),
    "min_p": (-1, "at least 0.0"),
    "top_k": (-2, "at least -1"),
    "n": (0, "at least 1"),
    "max_tokens": (0, "at least 1"),
    "max_completion_tokens": (-5, "at least 1"),
    "min_tokens": (-1, "at least 0"),
    "presence_penalty": (2.5, "at most 2.0"),
    "frequency_penalty": (-3, "at least -2.0"),
    "repetition_penalty": (1e-45, "at least 0.01 and at most 100.0"),
    "seed": (2**64, f"at most {2**64 - 1}"),
    "logit_bias": ({"3": 101}, "at most 100.0"),
    "stop_token_ids": ([VOCAB], f"below the vocabulary size {VOCAB}"),
    "priority": (2**31, "<= 2147483647"),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_value_out_of_range_is_named_with_its_limit(name):
    value, limit = OUT_OF_RANGE[name]
    error = chat_refusal(**{name: value})
    assert error["param"] == name
    assert error["message"].startswith(name)
    assert limit in error["message"]
    shown = value[0] if isinstance(value, list) else value
    shown = next(iter(value.values())) if isinstance(value, dict) else shown
    assert str(shown) in error["message"]


WRONG_TYPE = {
    "temperature": "hot",
    "n": 1.5,
    "stream": "yes",
    "stop": 5,
    "max_tokens": True,
    "logit_bias": {"3": "much"},
    "messages": "hi",
    "model": 3,
    "stop_token_ids": 5,
    "logprobs": 2,
    "stream_options": [],
}


@pytest.mark.parametrize("name", WRONG_TYPE)
def test_a_value_of_the_wrong_type_is_named_and_shown(name):
    error = chat_refusal(**{name: WRONG_TYPE[name]})
    assert error["param"] == name
    wrong = WRONG_TYPE[name]
    shown = repr(wrong["3"]) if isinstance(wrong, dict) else json.dumps(wrong)
    assert shown in error["message"]


LONG = "x" * 2**20


@pytest.mark.parametrize(
    "fields",
    [
        {"n": LONG},
        {LONG: 1},
        {"model": LONG},
        {"stream": True, "stream_options": {LONG: 1}},
        {"logit_bias": {LONG: 1}},
        {"tools": [LONG]},
        {"messages": [USER | {LONG: 1}]},
        {"messages": [USER | {"role": LONG}]},
        {"messages": [USER | {"content": [TEXT | {LONG: 1}]}]},
        {"messages": [USER | {"content": [TEXT | {"type": LONG}]}]},
        {"messages": [USER], "chat_template_kwargs": {"refuse": LONG}},
        {"seed": 10**4000},
        {"max_tokens": 10**4000},
        {"logprobs": True, "top_logprobs": 10**4000},
    ],
)
def test_little_of_what_was_sent_is_repeated(fields):
    _, error = refusal(parse_chat, {"messages": [USER]} | fields, REFUSING)
    assert len(error["message"]) + len(error["param"] or "") < 400
    shown = 200 if "chat_template_kwargs" in fields else 80
    assert not re.search(f"x{{{shown + 1}}}|0{{81}}", f"{error['message']} {error['param']}")
    if "n" in fields:
        assert f"{len(LONG) + 2} characters" in error["message"]


def test_a_completion_repeats_as_little():
    for fields in ({"best_of": 10**4000}, {"logprobs": 10**4000}, {"prompt": {"a": LONG}}):
        assert len(completion_refusal(**fields)["message"]) < 250


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"continuous_usage_stats": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tools"),
        ({"functions": [TOOL], "function_call": "auto"}, "functions"),
        (
            {"messages": [{"role": "user", "content": [TEXT | {"x": 1}]}]},
            "messages[0].content[0].x",
        ),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(MAX_LOGIT_BIAS + 1)}}, "logit_bias"),
        ({"stop_token_ids": [1] * (MAX_STOP_TOKEN_IDS + 1)}, "stop_token_ids"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {str(VOCAB): 1}}, "logit_bias"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ({"messages": []}, "messages"),
        ({"messages": [USER, 3]}, "messages[1]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [USER, {"role": "robot", "content": "x"}]}, "messages[1].role"),
        ({"messages": [USER | {"tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls"),
        ({"messages": [USER | {"weight": 1}]}, "messages[0].weight"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "messages[0].content[0].text",
        ),
    ],
)
def test_combinations_and_nested_fields(fields, param):
    error = chat_refusal(**fields)
    assert error["param"].startswith(param)
    assert error["message"]


def test_pictures_are_refused():
    parts = [{"type": "image_url", "image_url": {"url": "data:"}}]
    error = chat_refusal(messages=[{"role": "user", "content": parts}])
    assert error["param"].startswith("messages[0].content[0]")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt[0]"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt[1]"),
        ({"prompt": [1, "a"]}, "prompt[1]"),
        ({"prompt": [True]}, "prompt[0]"),
        ({"prompt": [[1], "a"]}, "prompt[1]"),
        ({"prompt": [5, VOCAB]}, "prompt"),
        ({"prompt": [[5], [-1]]}, "prompt[1]"),
        ({"prompt": ["a"] * (MAX_PROMPTS + 1)}, "prompt"),
        ({"best_of": 3}, "best_of"),
        ({"best_of": 3, "n": 2}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": True, "logprobs": 1, "n": 2}, "echo"),
        ({"messages": [USER]}, "messages"),
        ({"tools": []}, "tools"),
    ],
)
def test_completions(fields, param):
    assert completion_refusal(**fields)["param"] == param


def test_required_fields():
    for parse, body, param in ((parse_chat, {}, "messages"), (parse_completion, {}, "prompt")):
        _, error = refusal(parse, body)
        assert error["param"] == param
        assert error["message"] == f"{param} is required"


def test_an_unknown_model_is_a_404():
    for parse, body in ((parse_chat, {"messages": [USER]}), (parse_completion, {"prompt": "x"})):
        status, error = refusal(parse, body | {"model": "gpt-4"})
        assert status == 404
        assert error["code"] == "model_not_found"
        assert "'gpt-4'" in error["message"]
        assert MODEL.name in error["message"]


@pytest.mark.parametrize(
    ("limits", "prompt", "max_tokens", "numbers"),
    [
        ({}, [1] * (CONTEXT + 1), None, [CONTEXT, CONTEXT + 1]),
        ({}, [1] * 90, 8, [CONTEXT, 90, 8, 97]),
        ({"max_pool_tokens": 64}, [1] * 65, 1, [64, 65]),
        ({"max_pool_tokens": 64}, [1] * 60, 6, [64, 60, 6, 65]),
    ],
)
def test_what_does_not_fit_is_refused_with_all_numbers(limits, prompt, max_tokens, numbers):
    body = {"prompt": prompt, "max_tokens": max_tokens}
    status, error = refusal(parse_completion, body, served_model(**limits))
    assert status == 400
    assert error["code"] == "context_length_exceeded"  # by this, or by these words, clients know it
    assert error["message"].startswith(
        f"This model's maximum context length is {numbers[0]} tokens"
    )
    assert error["param"] == "prompt"
    words = error["message"].replace(":", " ").replace(",", " ").split()
    assert [int(word) for word in words if word.isdigit()] == numbers


@pytest.mark.parametrize(
    ("limits", "prompt", "max_tokens"),
    [
        ({}, [1] * CONTEXT, 1),
        ({}, [1] * CONTEXT, None),
        ({}, [1] * 90, 7),
        ({"max_pool_tokens": 64}, [1] * 60, 5),
    ],
)
def test_what_just_fits_is_accepted(limits, prompt, max_tokens):
    body = {"prompt": prompt, "max_tokens": max_tokens}
    call = parse_completion(json.dumps(body).encode(), served_model(**limits))
    assert call.requests[0].prompt_token_ids == prompt


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b'{"messages": [}',
        b"[]",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b'{"temperature": NaN, "messages": []}',
        b'{"temperature": 1e999, "messages": []}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)
def test_what_is_no_json_object_is_refused(body):
    status, error = refusal(parse_chat, body)
    assert status == 400
    assert "body" in error["message"] or "messages" in error["message"]


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = [
    *OUT_OF_RANGE,
    *WRONG_TYPE,
    *UNSUPPORTED_CHAT,
    "echo",
    "prompt",
    "top_logprobs",
    "cache_salt",
    "priority",
    "chat_template_kwargs",
]


@given(st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=4))
def test_any_body_is_a_call_or_a_refusal(fields):
    for parse, body in ((parse_chat, {"messages": [USER]}), (parse_completion, {"prompt": "x"})):
        try:
            content = json.dumps(body | fields).encode()
        except UnicodeEncodeError:
            continue
        with suppress(ApiError):  # and nothing else
            assert parse(content, MODEL).requests
