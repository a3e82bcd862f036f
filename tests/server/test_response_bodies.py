"""Bodies of the Responses API become what the same chat becomes, or are refused by name."""

import json

import msgspec
import pytest

from minisgl.server.body import ApiError
from minisgl.server.chat import parse_chat
from minisgl.server.responses import parse_response
from tests.server.tool_models import CLOCK, WEATHER, model


def flat(tool):
    return {"type": "function", **tool["function"]}


def parsed(body, parse=parse_response, served=None):
    return parse(json.dumps(body).encode(), served or model())


def refusal(body, served=None):
    with pytest.raises(ApiError) as caught:
        parsed(body, served=served)
    assert caught.value.status == 400
    return caught.value.body["error"]


USER = {"role": "user", "content": "hi"}
CALL = {"call_id": "c1", "name": "weather", "arguments": '{"place": "x"}'}
CHAT_CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"place": "x"}'},
}
DRY = {"type": "text", "text": "dry"}
JSON = {"type": "json_schema"}
NAMED = {"name": "n", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CLOCK_ALONE = {"type": "allowed_tools", "tools": [{"type": "function", "name": "clock"}]}
ALIKE = {
    "a text": ({"input": "hi"}, {"messages": [USER]}),
    "instructions": (
        {"input": "hi", "instructions": "Be kind."},
        {"messages": [{"role": "system", "content": "Be kind."}, USER]},
    ),
    "roles and parts": (
        {
            "input": [
                {"role": "developer", "content": "d"},
                {"type": "message", "role": "user", "status": "completed", "content": [
                    {"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}
                ]},
                {"type": "message", "id": "msg_1", "role": "assistant", "content": [
                    {"type": "output_text", "text": "c", "annotations": [], "logprobs": []}
                ]},
                {"role": "user", "content": "e"},
            ]
        },
        {
            "messages": [
                {"role": "system", "content": "d"},
                {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]},
                {"role": "assistant", "content": [{"type": "text", "text": "c"}]},
                {"role": "user", "content": "e"},
            ]
        },
    ),
    "calls of one turn": (
        {
            "input": [
                USER,
                {"type": "reasoning", "id": "rs_1", "summary": [], "content": [
                    {"type": "reasoning_text", "text": "Hm."}
                ]},
                {"role": "assistant", "content": "Let me see."},
                {"type": "function_call", "id": "fc_1", "status": "completed", **CALL},
                {"type": "function_call", **CALL | {"call_id": "c2"}},
                {"type": "function_call_output", "call_id": "c2", "output": "wet"},
                {"type": "function_call_output", "call_id": "c1", "output": [
                    {"type": "input_text", "text": "dry"}
                ]},
            ],
            "tools": [flat(WEATHER)],
        },
        {
            "messages": [
                USER,
                {
                    "role": "assistant",
                    "content": "Let me see.",
                    "reasoning_content": "Hm.",
                    "tool_calls": [CHAT_CALL, CHAT_CALL | {"id": "c2"}],
                },
                {"role": "tool", "tool_call_id": "c2", "content": "wet"},
                {"role": "tool", "tool_call_id": "c1", "content": [DRY]},
            ],
            "tools": [WEATHER],
        },
    ),
    "nothing said": (
        {
            "input": [
                {"role": "user", "content": []},
                {"type": "function_call", **CALL},
                {"type": "function_call_output", "call_id": "c1", "output": []},
            ],
        },
        {
            "messages": [
                {"role": "user", "content": ""},
                {"role": "assistant", "content": "", "tool_calls": [CHAT_CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": ""},
            ],
        },
    ),
    "turns of calls": (
        {
            "input": [
                {"type": "function_call", **CALL},
                {"type": "function_call_output", "call_id": "c1", "output": "wet"},
                {"type": "function_call", **CALL | {"call_id": "c2"}},
                {"type": "function_call_output", "call_id": "c2", "output": "dry"},
                {"role": "assistant", "content": "one"},
                {"role": "assistant", "content": "two"},
            ],
        },
        {
            "messages": [
                {"role": "assistant", "content": "", "tool_calls": [CHAT_CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "wet"},
                {"role": "assistant", "content": "", "tool_calls": [CHAT_CALL | {"id": "c2"}]},
                {"role": "tool", "tool_call_id": "c2", "content": "dry"},
                {"role": "assistant", "content": "one"},
                {"role": "assistant", "content": "two"},
            ]
        },
    ),
    "sampling and extras": (
        {"input": "hi", "max_output_tokens": 7, "temperature": 0.3, "top_p": 0.5, "top_k": 4,
         "stop": "x", "chat_template_kwargs": {"thinking": True},
         "include": ["message.output_text.logprobs"], "top_logprobs": 3},
        {"messages": [USER], "max_tokens": 7, "temperature": 0.3, "top_p": 0.5, "top_k": 4,
         "stop": "x", "chat_template_kwargs": {"thinking": True},
         "logprobs": True, "top_logprobs": 3},
    ),
    "a schema": (
        {"input": "hi", "text": {"format": JSON | NAMED | {"strict": True}}},
        {"messages": [USER], "response_format": JSON | {"json_schema": NAMED | {"strict": True}}},
    ),
    "a lenient schema beside tools": (
        {"input": "hi", "tools": [flat(CLOCK)], "text": {"format": NAMED | JSON}},
        {"messages": [USER], "tools": [CLOCK], "response_format": JSON | {"json_schema": NAMED}},
    ),
    "an object": (
        {"input": "hi", "text": {"format": {"type": "json_object"}, "verbosity": "medium"}},
        {"messages": [USER], "response_format": {"type": "json_object"}},
    ),
    "tools": (
        {"input": "hi", "tools": [flat(WEATHER), flat(CLOCK)], "parallel_tool_calls": False},
        {"messages": [USER], "tools": [WEATHER, CLOCK], "parallel_tool_calls": False},
    ),
    "a call required": (
        {"input": "hi", "tools": [flat(WEATHER)], "tool_choice": "required"},
        {"messages": [USER], "tools": [WEATHER], "tool_choice": "required"},
    ),
    "none to call": (
        {"input": "hi", "tools": [flat(WEATHER)], "tool_choice": "none"},
        {"messages": [USER], "tools": [WEATHER], "tool_choice": "none"},
    ),
    "one named": (
        {"input": "hi", "tools": [flat(WEATHER), flat(CLOCK)],
         "tool_choice": {"type": "function", "name": "clock"}},
        {"messages": [USER], "tools": [WEATHER, CLOCK],
         "tool_choice": {"type": "function", "function": {"name": "clock"}}},
    ),
    "some allowed": (
        {"input": "hi", "tools": [flat(WEATHER), flat(CLOCK)],
         "tool_choice": CLOCK_ALONE | {"mode": "auto"}},
        {"messages": [USER], "tools": [CLOCK]},
    ),
    "some allowed, one required": (
        {"input": "hi", "tools": [flat(WEATHER), flat(CLOCK)],
         "tool_choice": CLOCK_ALONE | {"mode": "required"}},
        {"messages": [USER], "tools": [CLOCK], "tool_choice": "required"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("body", "chat"), ALIKE.values(), ids=ALIKE)
def test_a_body_asks_for_what_a_chat_asks_for(body, chat):
    mine, other = parsed(body), parsed(chat, parse_chat)
    (request,), (expected,) = mine.requests, other.requests
    assert request.prompt_token_ids == expected.prompt_token_ids
    seed = {"seed": request.params.seed}  # each has a random one
    assert request.params == msgspec.structs.replace(expected.params, **seed)
    assert mine.form == other.form
    names = {"response_format": "text.format"}
    assert mine.structured_by == names.get(other.structured_by, other.structured_by)


NOTHING = {
    "store": False, "background": False, "truncation": "disabled", "service_tier": "auto",
    "previous_response_id": None, "conversation": None, "reasoning": {"effort": None},
    "max_tool_calls": 3, "include": [], "stream_options": {"include_obfuscation": False},
    "prompt_cache_retention": "in_memory", "prompt_cache_options": {"mode": "implicit"},
    "metadata": {"a": "b"}, "user": "u", "safety_identifier": "s", "prompt_cache_key": "k",
    "text": {"format": {"type": "text"}}, "tools": [], "tool_choice": "auto",
}  # fmt: skip


def test_fields_that_ask_for_nothing_change_nothing():
    plain, full = parsed({"input": "hi"}), parsed({"input": "hi"} | NOTHING)
    assert plain.requests[0].prompt_token_ids == full.requests[0].prompt_token_ids
    assert full.repeated["metadata"] == {"a": "b"}
    assert (full.repeated["user"], full.repeated["store"]) == ("u", False)


def item(**fields):
    return {"input": [USER, fields]}


FORMAT = {"type": "json_schema", "name": "n", "schema": {}}
REFUSED = [
    ({}, "input", "input is required"),
    ({"input": 3}, "input", "got 3"),
    ({"input": []}, "input", "input must hold at least one item, got 0"),
    ({"input": "hi", "messages": []}, "messages", "messages is not a field that is supported"),
    ({"input": "hi", "max_tokens": 3}, "max_tokens", "max_tokens is not a field"),
    ({"input": "hi", "n": 2}, "n", "n is not a field"),
    ({"input": "hi", "store": True}, "store", "store is not supported, got true"),
    ({"input": "hi", "background": True}, "background", "got true"),
    ({"input": "hi", "previous_response_id": "r"}, "previous_response_id", 'got "r"'),
    ({"input": "hi", "conversation": {"id": "c"}}, "conversation", "not supported"),
    ({"input": "hi", "prompt": {"id": "p"}}, "prompt", "not supported"),
    ({"input": "hi", "metadata": {str(i): "x" for i in range(17)}}, "metadata", "length <= 16"),
    ({"input": "hi", "metadata": {"a": "x" * 513}}, "metadata[...]", "length <= 512"),
    ({"input": "hi", "metadata": {"a": 1}}, "metadata[...]", "expected `str`"),
    ({"input": "hi", "user": "x" * 513}, "user", "length <= 512"),
    ({"input": "hi", "truncation": "auto"}, "truncation", 'got "auto"'),
    ({"input": "hi", "reasoning": {"effort": "low"}}, "reasoning.effort", 'got "low"'),
    ({"input": "hi", "reasoning": {"summary": "auto"}}, "reasoning.summary", 'got "auto"'),
    ({"input": "hi", "stream_options": {"include_usage": True}}, "stream_options.include_usage",
     "is not a field"),
    ({"input": "hi", "stream_options": {"include_obfuscation": True}},
     "stream_options.include_obfuscation", "got true"),
    ({"input": "hi", "include": ["reasoning.encrypted_content"]}, "include[0]", "must be message."),
    ({"input": "hi", "top_logprobs": 3}, "top_logprobs", "needs include to hold message.output"),
    ({"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 21},
     "top_logprobs", "at most 20, got 21"),
    ({"input": "hi", "max_output_tokens": 0}, "max_output_tokens", "max_output_tokens must be at"),
    ({"input": "hi", "min_tokens": 9, "max_output_tokens": 4}, "min_tokens",
     "min_tokens must be at most max_output_tokens (4), got 9"),
    ({"input": "hi", "max_output_tokens": 10**6}, "input", "max_output_tokens"),
    ({"input": "x" * 20_000}, "input", "input has at least"),
    ({"input": "hi", "temperature": -1}, "temperature", "got -1"),
    ({"input": "hi", "text": {"verbosity": "low"}}, "text.verbosity", 'got "low"'),
    ({"input": "hi", "text": {"format": {"type": "xml"}}}, "text.format.type", "must be"),
    ({"input": "hi", "text": {"format": {"type": "json_schema", "schema": {}}}},
     "text.format.name", "is required"),
    ({"input": "hi", "text": {"format": FORMAT | {"name": "a b"}}}, "text.format.name", "matching"),
    ({"input": "hi", "text": {"format": FORMAT}, "structured_outputs": {"regex": "a"}},
     "structured_outputs", "with a text.format of type json_schema"),
    ({"input": "hi", "text": {"format": FORMAT}, "min_tokens": 2}, "min_tokens", "text.format"),
    ({"input": "hi", "tools": [{"type": "web_search"}]},  "tools[0].type", 'must be "function"' ),
    ({"input": "hi", "tools": [WEATHER]}, "tools[0].function", "is not a field"),
    ({"input": "hi", "tools": [flat(CLOCK), flat(CLOCK)]}, "tools[1].name", "another for each"),
    ({"input": "hi", "tools": [flat(CLOCK) | {"parameters": {"type": "array"}}]},
     "tools[0].parameters.type", "array"),
    ({"input": "hi", "tool_choice": "required"}, "tool_choice", "needs tools"),
    ({"input": "hi", "tool_choice": "maybe"}, "tool_choice", 'got "maybe"'),
    ({"input": "hi", "tool_choice": {"type": "file_search"}}, "tool_choice.type", "file_search"),
    ({"input": "hi", "tools": [flat(CLOCK)], "tool_choice": {"type": "function", "name": "x"}},
     "tool_choice.name", 'got "x"'),
    ({"input": "hi", "tools": [flat(CLOCK)], "tool_choice": {"type": "allowed_tools",
      "mode": "auto", "tools": [{"type": "function", "name": "x"}]}},
     "tool_choice.tools[0].name", 'got "x"'),
    (item(role="tool", content="x"), "input[1].role", 'got "tool"'),
    (item(role="user"), "input[1].content", "is required"),
    (item(role="user", content=[{"type": "input_image", "image_url": "x"}]),
     "input[1].content[0].type", 'got "input_image"'),
    (item(role="user", content=[{"type": "input_file", "file_id": "x"}]),
     "input[1].content[0].type", 'got "input_file"'),
    (item(role="user", content=[{"type": "input_text"}]), "input[1].content[0].text", "required"),
    (item(type="item_reference", id="x"), "input[1].type", 'got "item_reference"'),
    (item(type="web_search_call", id="x"), "input[1].type", 'got "web_search_call"'),
    (item(type=3), "input[1].type", "got 3"),
    (item(type="reasoning", summary=[{"type": "summary_text", "text": "x"}]),
     "input[1].summary", "not supported"),
    (item(type="reasoning", summary=[], encrypted_content="x"),
     "input[1].encrypted_content", "not supported"),
    (item(type="function_call", **CALL | {"arguments": "x"}), "input[1].arguments", 'got "x"'),
    (item(type="function_call", name="weather", arguments="{}"), "input[1].call_id", "required"),
    (item(type="function_call_output", call_id="c9", output="x"), "input[1].call_id", 'got "c9"'),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "says"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_done_is_refused_by_its_own_name(body, param, says):
    error = refusal(body)
    assert error["param"] == param
    assert says in error["message"]
    assert param.split("[")[0].split(".")[0] in error["message"]


def test_a_models_refusals_name_the_input():
    error = refusal(
        {"input": [{"role": "user", "content": "x"}]}, model("{{ raise_exception('No.') }}")
    )
    assert (error["param"], error["message"]) == (
        "input",
        "the chat template refused the messages: No.",
    )
    error = refusal(
        ALIKE["turns of calls"][0], model("{% for m in messages %}{{ m.content }}{% endfor %}")
    )
    assert error["param"] == "input"
    assert error["message"].startswith('input: earlier calls of "weather"')
    error = refusal({"input": "hi", "tools": [flat(CLOCK)]}, model(tools=None))
    assert error["param"] == "tools"
