"""Tools and conversations with calls: what becomes of them in a prompt, and what is refused."""

import contextlib
import json

import pytest

from minisgl.server.answer import AnswerParser
from minisgl.server.body import ApiError
from minisgl.server.chat import parse_chat
from minisgl.server.tool_formats import TOOL_FORMATS
from minisgl.server.tools import MAX_CALLS, MAX_TOOLS
from tests.server import small_tokenizers
from tests.server.calls import USER
from tests.server.templates import MISTRAL
from tests.server.tool_models import CALLED, CLOCK, model, prompt


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
        (
            {"tools": [CLOCK, function(parameters={"type": "string"})]},
            "tools[1].function.parameters.type",
            'tools[1].function.parameters.type must be "object", got "string"',
        ),
        (
            {"tools": [function(parameters={"type": ["object", "null"]})]},
            "tools[0].function.parameters.type",
            'got ["object", "null"]',
        ),
        (
            {"tools": [function(parameters={"type": None})]},
            "tools[0].function.parameters.type",
            "got null",
        ),
        (
            {"tools": [function(strict=True, parameters={"x-guidance": {"lenient": True}})]},
            "tools[0].function.parameters.x-guidance",
            'got {"lenient": true}',
        ),
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
    forms = "--tool-call-parser, one of ['qwen3_coder',"
    param, wrong = refusal(model(tools=None), tools=[CLOCK])
    assert param == "tools"
    assert forms in wrong
    assert "--chat-template" not in wrong
    for tools in ("hermes", None):  # what is missing is named at once
        param, wrong = refusal(model("{{ messages[0].content }}", tools), tools=[CLOCK])
        assert param == "tools"
        assert "--chat-template FILE" in wrong
        assert (forms in wrong) == (tools is None)
    plain = model(small_tokenizers.CHAT_TEMPLATE)
    assert refusal(plain, **said(ASSISTANT, ANSWER))[0] == "messages"
    for name in ("user", "assistant", "s", "mark-0-0-"):  # words that the template has anyway
        assert refusal(plain, **called(name=name))[0] == "messages"
        given = {"type": "function", "function": {"name": name}}
        assert refusal(plain, tools=[given])[0] == "tools"
        assert prompt(called(name=name) | {"tools": [given]})
    assert prompt({"messages": USER, "tools": [CLOCK], "tool_choice": "none"}, model(tools=None))


def test_calls_that_a_mark_opens_fit_their_schemas_though_nobody_asks():
    def lark(served, **changes):
        body = {"messages": USER, "tools": [CLOCK]} | changes
        held = parse_chat(json.dumps(body).encode(), served).params.structured_outputs
        return held and json.loads(held)["grammar"]

    hermes = model(tools="hermes")
    for choice in (None, "auto"):
        found = lark(hermes, tool_choice=choice)
        assert "answer: text | before" in found
        assert '"x-guidance": {"lenient": true}' in found
    assert lark(hermes, tool_choice="none") is None
    # No grammar goes with these.
    for name in TOOL_FORMATS:
        assert lark(model(tools=name), ignore_eos=True) is None
    assert lark(hermes, min_tokens=2, max_tokens=4) is None
    assert "answer: text | before" in lark(model(tools="qwen3_coder"))
    for bare in ("llama3_json", "pythonic"):
        assert "answer: text | calls" in lark(model(tools=bare))


@pytest.mark.parametrize("thinking", [False, True])
def test_a_structured_answer_begins_behind_reasoning(thinking):
    schema = {"type": "object", "required": ["a"]}
    asked = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    body = {"messages": USER, "response_format": asked}
    body["chat_template_kwargs"] = {"thinking": thinking or None}
    call = parse_chat(json.dumps(body).encode(), model())
    assert (call.form.reasoning is not None, call.form.is_open) == (True, thinking)
    (lark,) = json.loads(call.params.structured_outputs).values()
    assert lark.splitlines()[0].startswith("start: thought SPACE" if thinking else "start: (<[")
    assert lark.endswith('"required": ["a"], "x-guidance": {"lenient": true}}')
    plain = parse_chat(json.dumps(body).encode(), model(reasoning=None))
    assert json.loads(plain.params.structured_outputs) == {"json": schema, "strict": False}
    regex = body | {"response_format": None, "structured_outputs": {"regex": "a+"}}
    if thinking:
        assert refusal(**regex)[0] == "structured_outputs"
    else:  # the answer itself fits, as a whole
        assert parse_chat(json.dumps(regex).encode(), model()).form.reasoning is None


S = {"type": "object", "required": ["a"]}


@pytest.mark.parametrize("tools", [None, [CLOCK]], ids=["reasoning", "tools"])
@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"json": S, "regex": "a+"}, "must hold one of"),
        ({"json_object": False}, "structured_outputs.json_object must be true"),
        ({"json": S, "strict": 0}, "structured_outputs.strict must be a boolean"),
        ({"json": 1}, "of type object or boolean or string, got 1"),
        ({"json": "{"}, "structured_outputs.json cannot be read as JSON"),
        (
            {"json": "[1]"},
            "json must be a schema, an object or a boolean, got [1]",
        ),
        (
            {"json": S | {"x-guidance": {"lenient": True}}},
            "structured_outputs.json: #/x-guidance: x-guidance is not supported",
        ),
    ],
    ids=range(7),
)
def test_structured_outputs_are_checked_beside_tools_and_reasoning(tools, asked, says):
    param, message = refusal(tools=tools, structured_outputs=asked)
    assert param == "structured_outputs"
    assert says in message


@pytest.mark.parametrize("tools", [None, [CLOCK]], ids=["reasoning", "tools"])
def test_structured_outputs_are_read_alike_beside_tools_and_reasoning(tools):
    def last_rule(**asked):
        body = {"messages": USER, "tools": tools} | asked
        call = parse_chat(json.dumps(body).encode(), model())
        return json.loads(call.params.structured_outputs)["grammar"].splitlines()[-1]

    strict = f"text: %json {json.dumps(S)}"
    for asked in (
        {"json": S},
        {"json": S, "strict": None},
        {"json": json.dumps(S)},
        {"json": S, "regex": None},
    ):
        assert last_rule(structured_outputs=asked) == strict
    assert "lenient" in last_rule(structured_outputs={"json": json.dumps(S), "strict": False})
    assert last_rule(structured_outputs={"json": "true"}) == "text: %json true"
    named = {"name": "n", "schema": S | {"x-guidance": {"lenient": True}}, "strict": True}
    wrong = {"type": "json_schema", "json_schema": named}
    param, message = refusal(tools=tools, response_format=wrong)
    assert param == "response_format"
    assert message.startswith("response_format.json_schema.schema: #/x-guidance: ")


def test_arguments_of_too_many_values_are_refused_before_they_are_read():
    lists = '{"a": [' + "[]," * 15_000 + "[]]}"
    called_twice = [CALLED | {"function": CALLED["function"] | {"arguments": lists}}] * 2
    _, message = refusal(**said({"role": "assistant", "tool_calls": called_twice[:1]}))
    assert message.startswith("This model's maximum context length is")
    _, message = refusal(**said({"role": "assistant", "tool_calls": called_twice}))
    assert message.startswith("the arguments of tool calls must hold at most 20000 arrays")


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


def test_a_structured_answer_may_be_a_call_instead():
    strict = function(strict=True)
    form = {"type": "json_object"}
    for tools in ([CLOCK], [strict]):
        for name in ("llama3_json", "pythonic"):  # which begin as an answer in JSON may
            served = model(tools=name)
            assert refusal(served, tools=tools, response_format=form)[0] == "response_format"
        body = {"messages": USER, "tools": tools, "response_format": form}
        call = parse_chat(json.dumps(body).encode(), model())
        assert call.form.tools is TOOL_FORMATS["hermes"]
        assert call.structured_by == "response_format"
        (lark,) = json.loads(call.params.structured_outputs).values()
        assert lark.endswith('\ntext: %json {"type": "object"}')
        assert prompt({"messages": USER, "tools": tools, "response_format": {"type": "text"}})
        call = parse_chat(json.dumps(body).encode(), model(MISTRAL, "mistral"))
        text = '{"a": "[TOOL_CALLS]f{}"}'
        parser = AnswerParser(call.form)
        assert [(n.kind, n.text) for n in (*parser.push(text), *parser.end())] == [("text", text)]
    body = {"messages": USER, "tools": [strict], "response_format": form, "tool_choice": "none"}
    call = parse_chat(json.dumps(body).encode(), model())
    assert (call.form.tools, call.structured_by) == (None, "response_format")
    body = {"messages": USER, "tools": [strict], "tool_choice": "required"}
    assert parse_chat(json.dumps(body).encode(), model()).structured_by == "tools"
    assert parse_chat(json.dumps({"messages": USER}).encode(), model()).structured_by is None
