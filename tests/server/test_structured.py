"""Structured output over HTTP, by the real client, of the bundled model behind the real server."""

import asyncio
import json
import re
import time
from typing import Literal

import openai
import pydantic
import pytest

from tests.server.served import ROOT, Served

USER = [{"role": "user", "content": "What is the KV cache?"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served():
    server = Served("--dtype=float32", "--grammar-timeout=20")
    yield server
    server.close()


@pytest.fixture(scope="module")
def client(served):
    with served.client() as client:
        yield client


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


def as_format(schema, strict=True, **more):
    named = {"name": "answer", "schema": schema, "strict": strict} | more
    return {"type": "json_schema", "json_schema": named}


class Person(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=20)
    kind: Literal["person", "place"]
    tags: list[Literal["red", "green"]] = pydantic.Field(max_length=2)


def test_the_clients_parse_gives_an_object(client, model):
    for seed in range(3):
        answer = client.chat.completions.parse(
            model=model, messages=USER, response_format=Person, max_tokens=300, seed=seed
        )
        choice = answer.choices[0]
        if choice.finish_reason == "stop":
            assert isinstance(choice.message.parsed, Person)
            return
    pytest.fail("no answer ended by itself")


def test_a_stream_is_the_whole(client, model):
    asked = {
        "model": model,
        "messages": USER,
        "response_format": as_format(SCHEMA),
        "seed": 1,
        "n": 2,
    }
    whole = client.chat.completions.create(**asked, max_tokens=80)
    streamed = ["", ""]
    ends = ["", ""]
    for chunk in client.chat.completions.create(**asked, max_tokens=80, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
            ends[choice.index] += choice.finish_reason or ""
    assert streamed == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    for choice in whole.choices:
        if choice.finish_reason == "stop":
            found = json.loads(choice.message.content)
            assert found.keys() == {"name", "age"}


DOCUMENT = (ROOT / "docs/STRUCTURED.md").read_text()


@pytest.mark.parametrize(
    ("path", "body"), re.findall(r"curl \S+(/v1/\S+)[^\n]* -d '(\{.*?\})'", DOCUMENT, re.S)
)
def test_requests_of_the_document_are_answered(client, path, body):
    answer = client.post(path.removeprefix("/v1"), body=json.loads(body), cast_to=dict)
    (choice,) = answer["choices"]
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    assert re.fullmatch(r'\{ ?"name".*\}|20\d\d-\d\d-\d\d|\d\d?( \+ \d\d?)?', text.strip(), re.S)


def test_code_of_the_document_runs(served, capsys):
    with_client, offline = re.findall(r"```python\n(.*?)```", DOCUMENT, re.S)
    exec(with_client.replace("http://127.0.0.1:30000", served.wait_ready()), {})
    parsed, choice = capsys.readouterr().out.splitlines()
    assert parsed.startswith("name=")
    assert choice in ("yes", "no")
    exec(offline, {})
    assert capsys.readouterr().out in ('"red"\n', '"green"\n', "3\n")


def test_what_is_cut_is_told_as_cut(client, model):
    answer = client.chat.completions.create(
        model=model, messages=USER, response_format=as_format(SCHEMA), max_tokens=3
    )
    assert answer.choices[0].finish_reason == "length"
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model=model, messages=USER, response_format=Person, max_tokens=3
        )


@pytest.mark.parametrize(
    ("given", "expression"),
    [
        ({"regex": "[a-c]{4}-[0-9]{2}"}, "[a-c]{4}-[0-9]{2}"),
        ({"choice": ["yes", "no"]}, "yes|no"),
        ({"grammar": 'root ::= ("a" | "b") root | "c"'}, "[ab]*c"),
        ({"grammar": 'start: "x" WORD\nWORD: /[0-9]{3}/'}, "x[0-9]{3}"),
        ({"json": {"type": "boolean"}}, "true|false"),
        ({"json": json.dumps({"const": 7}), "regex": None}, "7"),
        ({"json_object": True}, r"(?s)\{.*\}"),
    ],
    ids=str,
)
def test_the_extra_field_on_both_endpoints(client, model, given, expression):
    extra = {"structured_outputs": given}
    asked = {"model": model, "max_tokens": 60, "temperature": 0.5, "seed": 2, "extra_body": extra}
    chat = client.chat.completions.create(messages=USER, **asked).choices[0]
    plain = client.completions.create(prompt=["one", "two"], **asked).choices
    found = [(chat.message.content, chat), *((choice.text, choice) for choice in plain)]
    assert [re.fullmatch(expression, text) is None for text, _ in found] == [
        choice.finish_reason == "length" for _, choice in found
    ]


def test_response_format_on_completions(client, model):
    answer = client.completions.create(
        model=model,
        prompt="x",
        max_tokens=100,
        extra_body={"response_format": as_format({"enum": ["red", 7]})},
    )
    assert answer.choices[0].text in ('"red"', "7")


def test_json_object(client, model):
    answer = client.chat.completions.create(
        model=model, messages=USER, response_format={"type": "json_object"}, max_tokens=200, seed=4
    )
    assert isinstance(json.loads(answer.choices[0].message.content), dict)
    assert "minisgl_warnings" not in answer.model_dump()


LOOSE = {"type": "object", "properties": {"a": {"type": "integer", "not": {}}}, "minItems": 1}


@pytest.mark.parametrize("strict", [False, None])
def test_what_is_not_kept_is_told(client, model, strict):
    warning = "#/properties/a/not: not is not supported; it is left out"
    asked = {
        "model": model,
        "messages": USER,
        "response_format": as_format(LOOSE, strict),
        "max_tokens": 9,
        "n": 2,
    }
    assert client.chat.completions.create(**asked).model_dump()["minisgl_warnings"] == [warning]
    chunks = [c.model_dump() for c in client.chat.completions.create(**asked, stream=True)]
    assert chunks[0]["minisgl_warnings"] == [warning]


def refusal(client, model, **asked):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=model, messages=USER, **asked)
    return caught.value.body["param"], caught.value.body["message"]


REFUSED = [
    (as_format(LOOSE), "schema: #/properties/a/not: not is not supported"),
    (as_format({"$ref": "#"}), "schema: #: the schema is unsatisfiable"),
    (as_format({"enum": ["x" * 2**17]}), "must have at most 131072 bytes as JSON"),
    (as_format({"enum": ["x" * 2**20]}), "bytes of response_format must be at least 0 and at most"),
    (as_format({"pattern": "(?!a)"}), "schema: #/pattern: character 0: look-around"),
    ({"type": "json_schema"}, "response_format.json_schema must be given with the type json_sch"),
    ({"type": "text", "json_schema": {}}, "must be given with the type json_schema, and only then"),
    ({"type": "xml"}, "response_format.type must be "),
    ({"type": "json_object", "schema": {}}, "response_format.schema is not a field"),
    (as_format({}, name="a b"), "response_format.json_schema.name: expected `str` matching"),
    (as_format([]), "response_format.json_schema.schema: expected `object`, got []"),
    ({"type": "json_schema", "json_schema": {"name": "n"}}, "json_schema.schema is required"),
    ({}, "response_format.type is required"),
]


@pytest.mark.parametrize(("given", "says"), REFUSED, ids=[says for _, says in REFUSED])
@pytest.mark.parametrize("stream", [False, True])
def test_a_response_format_is_refused_in_the_clients_words(client, model, given, says, stream):
    param, message = refusal(client, model, response_format=given, stream=stream)
    assert param.split(".")[0] == "response_format"
    assert says in message
    assert "structured_outputs" not in message
    assert len(message) < 600


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {}}, "structured_outputs", "must hold one of"),
        ({"structured_outputs": {"a": 1}}, "structured_outputs", "got ['a']"),
        (
            {"structured_outputs": {"grammar": 'start: a\na: %json {"not": {}}'}},
            "structured_outputs",
            "structured_outputs.grammar: %json 0: #/not: not is not supported",
        ),
        (
            {"structured_outputs": {"grammar": 'start: a b\na: %json {}\nb: %json {"not": {}}'}},
            "structured_outputs",
            "structured_outputs.grammar: %json 1: #/not: not is not supported",
        ),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 2}, "min_tokens", "cannot be given"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "got True"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs",
            "cannot be given with a response_format of type json_object",
        ),
    ],
    ids=range(8),
)
def test_the_extra_field_is_refused_by_name(client, model, asked, param, says):
    found, message = refusal(client, model, extra_body=asked)
    assert found == param
    assert says in message


def test_json_beside_tools_is_itself_or_a_call_and_another_form_is_refused(client, model):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    asked = {"model": model, "messages": USER, "tools": tools, "max_tokens": 80}
    for choice in ("auto", "none"):
        form = {"response_format": {"type": "json_object"}, "tool_choice": choice}
        message = client.chat.completions.create(**asked, **form).choices[0].message
        if message.tool_calls:
            assert choice == "auto"
            assert {call.function.name for call in message.tool_calls} == {"f"}
        else:
            assert message.content.startswith("{")
    regex = {"structured_outputs": {"regex": "a{4}"}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**asked, extra_body=regex)
    assert "tools" in caught.value.body["message"]
    answer = client.chat.completions.create(**asked, extra_body=regex, tool_choice="none")
    assert answer.choices[0].message.content == "aaaa"


def test_a_grammar_that_becomes_too_complex_is_an_error_and_no_stop(client, model):
    heavy = {"structured_outputs": {"regex": "(a{1,1000}){1,1000}"}}
    asked = {"model": model, "prompt": "aaaa", "max_tokens": 1500, "extra_body": heavy}
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**asked)
    assert "structured_outputs cannot be kept any further: " in caught.value.body["message"]
    ends = []

    def follow():
        for chunk in client.completions.create(**asked, stream=True):
            ends.append(chunk.choices[0].finish_reason)

    with pytest.raises(openai.APIError, match="cannot be kept any further"):
        follow()
    assert set(ends) <= {None}
    assert client.completions.create(model=model, prompt="a", max_tokens=2).choices[0].text


def test_a_compilation_of_seconds_delays_nobody(served, model):
    """A stream goes on beside a schema that takes long: no gap is as long as that."""
    large = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}

    async def stream(client, gaps):
        last = None
        chunks = await client.completions.create(
            model=model, prompt="Once", max_tokens=600, stream=True, extra_body={"ignore_eos": True}
        )
        async for _ in chunks:
            now = time.perf_counter()
            gaps += [] if last is None else [now - last]
            last = now

    async def compile(client, took):
        started = time.perf_counter()
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(
                model=model, messages=USER, response_format=as_format(large), max_tokens=4
            )
        took.append(time.perf_counter() - started)

    async def scene():
        url = f"{served.wait_ready()}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="x", max_retries=0) as client:
            gaps, took = [], []
            await asyncio.gather(stream(client, gaps), compile(client, took))
            return gaps, took

    gaps, (took,) = asyncio.run(scene())
    assert took > 0.2
    assert sorted(gaps)[-3] < took / 2
