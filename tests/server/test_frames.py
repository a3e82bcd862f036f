"""Answers that are held to a form of calls: they fit, are read as calls, and nothing else fits."""

import dataclasses
import json
import re
from concurrent.futures import Future
from functools import partial

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.build import read_tokenizer
from minisgl.grammar.backend import LlgBackend
from minisgl.server.answer import REASONING_FORMATS, AnswerForm, AnswerParser
from minisgl.server.frames import grammar
from minisgl.server.tool_formats import TOOL_FORMATS
from tests.server import small_tokenizers

PLACE = {
    "type": "object",
    "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["place"],
    "additionalProperties": False,
}
SCHEMAS = {"weather": PLACE, "clock": None, "any": {}}
HELD = sorted(TOOL_FORMATS)
# As text, or as tokens of their own.
MARKS = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "</think>", "[ARGS]"]
MARKS += ["<|python_start|>", "<|python_end|>"]


@pytest.fixture(scope="module", params=[0, 5, len(MARKS)], ids=["text", "tokens", "and [ARGS]"])
def world(request, tmp_path_factory):
    backend = tokenizers.Tokenizer.from_str(small_tokenizers.byte_level().to_str())
    backend.add_special_tokens(MARKS[: request.param])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    end = backend.token_to_id("<|im_end|>")
    made = LlgBackend(partial(read_tokenizer, path.parent), 400, [end])
    yield backend, made, end
    made.close()


def token_id(backend):
    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
    return added.get


def fits(world, form, said, is_spelled=False, **options):
    """Whether an answer may be this, and end behind it; spelled: without marks as tokens."""
    backend, made, end = world
    form = dataclasses.replace(form, must_call=options.pop("must_call", True))
    spec = grammar(form, token_id(backend), **{"exact": ["weather"]} | options)
    compiled: Future = made.compile(json.dumps({"grammar": spec}))
    state = compiled.result(30).copy()
    pieces = said if is_spelled else [said]
    ids = [i for text in pieces for i in backend.encode(text, add_special_tokens=False).ids]
    return not any(state.accept(i) for i in [*ids, end])


def written(world, name, called, between=None):
    """Calls as the frame has them."""
    backend, *_ = world
    if name == "pythonic":
        named = [
            (n, (f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in given.items()))
            for n, given in called
        ]
        return "[" + ", ".join(f"{n}({', '.join(given)})" for n, given in named) + "]"
    if name == "qwen3_coder":
        return "\n".join(in_tags(*each) for each in called)
    texts = [(n, json.dumps(arguments, ensure_ascii=False)) for n, arguments in called]
    if name == "hermes":
        frame = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'
        return "\n".join(frame.format(*each) for each in texts)
    if name == "llama3_json":
        return "; ".join('{{"name": "{}", "parameters": {}}}'.format(*each) for each in texts)
    if backend.token_to_id("[ARGS]") is not None:
        return "".join("[TOOL_CALLS]{}[ARGS]{}".format(*each) for each in texts)
    inside = ", ".join('{{"name": "{}", "arguments": {}}}'.format(*each) for each in texts)
    return f"[TOOL_CALLS][{inside}]"


def as_python(name, arguments):
    values = {k: json.dumps(v, ensure_ascii=False) for k, v in arguments.items()}
    return f"{name}({', '.join(f'{k}={v}' for k, v in values.items())})"


def in_tags(name, arguments):
    values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
    lines = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items()]
    return f"<tool_call>\n<function={name}>\n{''.join(lines)}</function>\n</tool_call>"


def form(name, reasoning=None, **options):
    return AnswerForm(REASONING_FORMATS.get(reasoning), TOOL_FORMATS[name], SCHEMAS, **options)


places = st.sampled_from(["", "Köln", '"{}[]', "<tool_call>", "</think>]", "\\ 🚀"])
days = st.none() | st.integers(-9, 9)
weather = st.tuples(places, days).map(  # in the order of the schema
    lambda found: {"place": found[0]} | ({} if found[1] is None else {"days": found[1]})
)
arguments = st.one_of(
    weather.map(lambda found: ("weather", found)),
    st.just(("clock", {})),
    st.dictionaries(st.sampled_from("ab"), st.none(), max_size=2).map(lambda found: ("any", found)),
)


@pytest.mark.parametrize("name", HELD)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_calls_fit_and_are_read_as_they_were_meant(world, name, data):
    called = data.draw(st.lists(arguments, min_size=1, max_size=2))
    if world[0].token_to_id("</think>") is not None:  # a mark that is a token has no spelling
        called = [(n, {"place": "x"} if "<" in a.get("place", "") else a) for n, a in called]
    reasoning = data.draw(st.sampled_from([None, "think"]))
    thought = data.draw(st.sampled_from(["<think>Hm { [</think>\n\n", ""])) if reasoning else ""
    must_call = data.draw(st.booleans())
    text = thought + written(world, name, called)
    shape = form(name, reasoning)
    assert fits(world, shape, text, must_call=must_call)
    parser = AnswerParser(shape)
    news = [*parser.push(text), *parser.end()]
    assert [n.text for n in news if n.kind == "name"] == [n for n, _ in called]
    for index, (_, meant) in enumerate(called):
        fragments = [n.text for n in news if n.kind == "arguments" and n.call == index]
        assert json.loads("".join(fragments)) == meant
    assert not [n for n in news if n.kind == "text"]


WRONG = [
    [("weather", {"where": "x"})],
    [("weather", {})],
    [("weather", {"place": "x", "days": 1.5})],
    [("clock", {"a": 1})],
    [("nobody", {})],
    [("any", [])],
]


@pytest.mark.parametrize("must_call", [True, False])
@pytest.mark.parametrize("called", WRONG)
@pytest.mark.parametrize("name", HELD)
def test_what_does_not_fit_cannot_be_written(world, name, called, must_call):
    shape = form(name, "think")
    if called == [("any", [])] and shape.tools.written:
        return  # arguments of this form have names
    text = written(world, name, called)
    for before in ("", "<think>x</think>", "Hm. "):
        may_be_text = bool(shape.tools.bare) and not must_call
        is_text = may_be_text and (before == "Hm. " or called == [("nobody", {})])
        assert fits(world, shape, before + text, must_call=must_call) == is_text


@pytest.mark.parametrize("name", HELD)
def test_text_fits_only_where_nothing_must_be_called(world, name):
    call = written(world, name, [("clock", {})])
    for text in ("", "Hello { world", "Hm. ", "<thin"):
        assert fits(world, form(name, "think"), text, must_call=False)
        assert not fits(world, form(name, "think"), text)
    assert fits(world, form(name), f"{call}", must_call=False)
    assert not fits(world, form(name), f"{call} and more")
    assert not fits(world, form(name), f"x{call}")


BARE = [name for name in HELD if TOOL_FORMATS[name].bare]


@pytest.mark.parametrize("name", BARE)
def test_without_a_mark_only_calls_of_tools_are_no_text(world, name):
    for text in (
        '{"name": "Ana", "age": 4}',
        '{"name": "weather_of", "parameters": {}}',
        '{"type": "weather", "name": "weather"}',
        '{"type": 1, "name": "weather", "parameters": {"place": 1}}',
        '{"weather": 1}',
        "[1, 2]",
        "[weather](http://x)",
        "[weather_of(a=1)]",
        " [",
    ):
        assert fits(world, form(name), text, must_call=False), text
        assert not fits(world, form(name), text), text
        parser = AnswerParser(form(name))
        assert not [n for n in [*parser.push(text), *parser.end()] if n.kind != "text"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama3_json", '{"type":"function"  "name": "weather", "parameters": {"place": 1}}'),
        ("llama3_json", '{ , "name": "weather", "parameters": {"place": 1}}'),
        ("llama3_json", '{"name": "we\\u0061ther", "parameters": {"place": 1}}'),
        ("llama3_json", '      {"name": "weather", "parameters": {"place": 1}}'),
        ("pythonic", "[, weather(place=1)]"),
        ("pythonic", "[       weather(place=1)]"),
        ("pythonic", "      [weather(place=1)]"),
    ],
)
def test_what_would_be_taken_for_a_bare_call_is_no_text(world, name, text):
    parser = AnswerParser(form(name))
    parser.push(text)
    assert parser.num_calls == 1
    assert not fits(world, form(name), text, must_call=False)


@pytest.mark.parametrize("must_call", [True, False])
def test_bare_calls_begin_in_more_ways_than_one(world, must_call):
    for name, texts in {
        "llama3_json": (
            '{"name":"clock", "parameters": {}}',
            '\n\n{ "name" : "clock", "parameters": {}}',
            '{\n"type": "function",\n"name": "clock", "parameters": {}}',
        ),
        "pythonic": (" [clock()]", "[ clock()]"),
    }.items():
        for text in texts:
            assert fits(world, form(name), text, must_call=must_call), text
            parser = AnswerParser(form(name))
            found = [(n.kind, n.text) for n in [*parser.push(text), *parser.end()]]
            assert found == [("name", "clock"), ("arguments", "{}")]


@pytest.mark.parametrize("must_call", [True, False])
@pytest.mark.parametrize("name", BARE)
def test_a_mark_before_bare_calls_is_one_where_it_is_a_token(world, name, must_call):
    opens, closes = TOOL_FORMATS[name].opens[0], TOOL_FORMATS[name].closes
    is_token = world[0].token_to_id(opens) is not None
    called = [("weather", {"place": "Oslo"}), ("clock", {})]
    text = written(world, name, called)
    for marked in (f"{opens}{text}", f"{opens}\n{text}{closes}"):
        assert fits(world, form(name), marked, must_call=must_call) == is_token
        parser = AnswerParser(form(name))
        news = [*parser.push(marked), *parser.end()]
        assert [n.text for n in news if n.kind == "name"] == ["weather", "clock"]
        assert not [n for n in news if n.kind == "text"]
    wrong = written(world, name, [("weather", {"place": 1})])
    for no_call in (f"{opens}{wrong}", f"{opens}Hm.", f"Hm. {opens}{text}", opens + opens + text):
        assert not fits(world, form(name), no_call, must_call=must_call)


PIECES = {
    "llama3_json": [
        *('{"name": "weather", "parameters": {"place": "x"}}', '{"name": "weather"', "{", "}"),
        *('"name"', '"type"', ":", ",", " ", "\n", '"weather"', '"we\\u0061ther"', '"function"'),
        *('"parameters"', '{"place": "x"}', '{"place": 1}', "1", "; ", '"'),
    ],
    "pythonic": [
        *('[weather(place="x")]', "weather", "place", '"x"', "clock", "weather(", "[weather("),
        *"[]()=1, \n",
    ],
}


@pytest.mark.parametrize("name", BARE)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_whatever_fits_holds_no_call_that_does_not(world, name, data):
    text = "".join(data.draw(st.lists(st.sampled_from(PIECES[name]), max_size=12)))
    if not fits(world, form(name), text, must_call=False):
        return
    parser = AnswerParser(form(name))
    news = [*parser.push(text), *parser.end()]
    names = [n.text for n in news if n.kind == "name"]
    assert parser.num_calls == parser.num_ended == len(names)
    for index, called in enumerate(names):
        found = "".join(n.text for n in news if n.kind == "arguments" and n.call == index)
        assert called != "weather" or isinstance(json.loads(found)["place"], str)


@pytest.mark.parametrize("name", HELD)
def test_one_call_at_most(world, name):
    twice = written(world, name, [("clock", {})] * 2)
    assert fits(world, form(name), twice)
    assert not fits(world, form(name, most_calls=1), twice)
    assert fits(world, form(name, most_calls=1), written(world, name, [("clock", {})]))


@pytest.mark.parametrize("name", HELD)
def test_reasoning_that_the_prompt_opened_comes_first(world, name):
    call = written(world, name, [("clock", {})])
    shape = form(name, "think", is_open=True)
    assert fits(world, shape, f"I see.</think>\n\n{call}")
    assert not fits(world, shape, call)
    assert not fits(world, shape, "I see.</think>So.")
    assert fits(world, shape, "I see.</think>So.", must_call=False)


ANSWER = {"type": "object", "properties": {"name": {"const": "x"}}, "required": ["name"]}


@pytest.mark.parametrize("is_open", [False, True])
def test_an_answer_to_a_schema_stands_behind_reasoning(world, is_open):
    thought = "I {see}</think>\n\n" if is_open else "<think>I {see}</think>\n\n"
    for name in (None, "hermes", "mistral"):
        shape = AnswerForm(REASONING_FORMATS["think"], is_open=is_open)
        if name is not None:
            shape = form(name, "think", is_open=is_open)
            call = written(world, name, [("clock", {})])
            assert fits(world, shape, thought + call, must_call=False, text=ANSWER)
            assert not fits(world, shape, thought + "x" + call, must_call=False, text=ANSWER)
            assert not fits(world, shape, thought + '{"name": "x"}', text=ANSWER)
        assert fits(world, shape, thought + '{"name": "x"}', must_call=False, text=ANSWER)
        assert not fits(world, shape, thought + '{"name": "y"}', must_call=False, text=ANSWER)
        assert not fits(world, shape, thought + "Hello", must_call=False, text=ANSWER)
        alone = fits(world, shape, '{"name": "x"}', must_call=False, text=ANSWER)
        assert alone == (not is_open)
        assert fits(world, shape, thought + "[]", must_call=False, text={})


@pytest.mark.parametrize("name", ["hermes", "mistral"])
def test_an_answer_to_a_schema_may_spell_marks_and_stays_text(world, name):
    shape = form(name, holds_text=True)
    mark = shape.tools.opens[0]
    for text in (f'{{"a": "{mark}clock{{}}"}}', f'["{mark}", "{shape.tools.closes}"]'):
        assert fits(world, shape, text, is_spelled=True, must_call=False, text={})
        parser = AnswerParser(shape)
        assert [(n.kind, n.text) for n in (*parser.push(text), *parser.end())] == [("text", text)]


MIXED = {
    "type": "object",
    "properties": {
        "kind": {"type": "string", "enum": ["rain", "a\nb"]},
        "short": {"type": "string", "minLength": 1, "maxLength": 3},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "on": {"type": "boolean"},
        "many": {"type": "array", "items": {"$ref": "#/$defs/one"}},
        "other": {},
        "never": False,
        "few": {"type": ["string", "null"], "enum": ["x", "long", None], "maxLength": 2},
        "some": {"type": ["string", "null"], "minLength": 3},
    },
    "required": ["short"],
    "$defs": {"one": {"type": "object", "properties": {"x": {"type": "number"}}}},
}
FIT = [
    {"kind": "a\nb", "short": "abc", "maybe": "null?", "on": False, "many": [{"x": 1}]},
    {"short": "x", "many": [], "other": "any text"},
    {"kind": "rain", "short": "x", "maybe": None, "few": None},
    {"short": "x", "few": "x", "some": '"a"'},
    {"short": "\n"},
    {"short": "x", "many": [{"x": 1, "y": "</parameter><parameter=on>\ntrue</function>"}]},
    {"short": "x", "many": [{"y": '\\"</parameter></function>'}], "other": "</para"},
]
MISFIT = [
    {},
    {"kind": "snow", "short": "x"},
    {"short": ""},
    {"short": "abcd"},
    {"short": "x", "on": "yes"},
    {"short": "x", "many": [{"x": "1"}]},
    {"short": "x", "more": 1},
    {"short": "x", "never": 1},
    {"short": "x", "few": "long"},
    {"short": "x", "few": "null "},
    {"on": True, "short": "x"},  # in the order of the schema
]


@pytest.mark.parametrize("name", ["pythonic", "qwen3_coder"])
def test_each_argument_that_is_written_by_itself_fits(world, name):
    shape = dataclasses.replace(form(name), schemas={"f": MIXED})
    for arguments, fit in [*((a, True) for a in FIT), *((a, False) for a in MISFIT)]:
        text = written(world, name, [("f", arguments)])
        assert fits(world, shape, text, exact=["f"]) == fit, text
        if fit:
            parser = AnswerParser(shape)
            news = [*parser.push(text), *parser.end()]
            assert json.loads("".join(n.text for n in news if n.kind == "arguments")) == arguments


ENDS = "</parameter></function>"  # of a call, but for where it stands
TEXT_LIST = {"type": "array", "items": {"type": "string"}}


@pytest.mark.parametrize(
    ("schema", "fit", "misfit"),  # texts and what is read of them
    [
        ({}, {"a": "a", "[1]": [1], "": ""}, []),
        ({"type": "string"}, {"a": "a", '"b"': '"b"', "7": "7"}, []),
        ({"type": ["string", "null"]}, {"a": "a", "null": None}, []),
        ({"type": "object"}, {json.dumps({"a": f'" {ENDS}'}): {"a": f'" {ENDS}'}}, ["a", "[]"]),
        (TEXT_LIST, {json.dumps([ENDS, "x"]): [ENDS, "x"], "[]": []}, ["[1]", "x", f"[] {ENDS}"]),
        ({"type": ["string", "integer"]}, {"7": 7, f'"{ENDS}"': ENDS}, ["7.5", "a"]),
        ({"$ref": "#/$defs/a"}, {"7": 7}, ["x"]),
    ],
)
def test_arguments_of_any_name_fit_the_schema_of_all(world, schema, fit, misfit):
    given = {"additionalProperties": schema, "$defs": {"a": {"type": "integer"}}}
    shape = dataclasses.replace(form("qwen3_coder"), schemas={"f": given})
    for said, meant in fit.items():
        text = written(world, "qwen3_coder", [("f", {"x": said, "y": said})])
        assert fits(world, shape, text), text
        parser = AnswerParser(shape)
        news = [*parser.push(text), *parser.end()]
        found = "".join(n.text for n in news if n.kind == "arguments")
        assert json.loads(found) == {"x": meant, "y": meant}
    for said in misfit:
        assert not fits(world, shape, written(world, "qwen3_coder", [("f", {"x": said})])), said


def test_numbers_that_no_machine_holds_stay_numbers(world):
    schema = {"properties": {"a": {"type": "number"}, "b": {"type": "object"}}}
    for name in ("pythonic", "qwen3_coder"):
        shape = dataclasses.replace(form(name), schemas={"f": schema})
        text = written(world, name, [("f", {"a": 7, "b": {"c": [8]}})])
        text = text.replace("7", "1e999").replace("8", "9" * 5000)
        parser = AnswerParser(shape)
        found = "".join(
            n.text for n in [*parser.push(text), *parser.end()] if n.kind == "arguments"
        )
        assert found == f'{{"a": 1e999, "b": {{"c": [{"9" * 5000}]}}}}'


def test_names_are_python_s_own(world):
    shape = dataclasses.replace(form("pythonic"), schemas={"f": {"properties": {"नाम": {}}}})
    text = "[f(नाम=27)]"
    assert fits(world, shape, text)
    parser = AnswerParser(shape)
    assert [n.text for n in [*parser.push(text), *parser.end()] if n.kind == "name"] == ["f"]


def test_definitions_are_the_root_s_and_written_where_they_are_needed(world):
    root = {"A": {"type": "integer"}, "unused": {"const": "unused"}}
    schema = {"$defs": root, "properties": {"a": {"$defs": {"A": {}}, "$ref": "#/$defs/A"}}}
    shape = dataclasses.replace(form("qwen3_coder"), schemas={"f": schema | {"required": ["a"]}})
    assert fits(world, shape, written(world, "qwen3_coder", [("f", {"a": 1})]), exact=["f"])
    assert not fits(world, shape, written(world, "qwen3_coder", [("f", {"a": True})]), exact=["f"])


def test_what_grows_when_it_is_written_out_is_refused(world):
    many = {f"x{i}": {"type": "string", "maxLength": 9} for i in range(400)}
    many["all"] = {"anyOf": [{"$ref": f"#/$defs/x{i}"} for i in range(400)]}
    schema = {"$defs": many, "properties": {f"p{i}": {"$ref": "#/$defs/all"} for i in range(400)}}
    shape = dataclasses.replace(form("qwen3_coder", must_call=True), schemas={"f": schema})
    spec = grammar(shape, lambda text: None, exact=())
    with pytest.raises(ValueError, match=r"become a grammar of \d+ characters, which may have"):
        world[1].compile(json.dumps({"grammar": spec})).result(30)


@pytest.mark.parametrize(
    ("schema", "place", "reason"),
    [
        ({"properties": {"a": {"type": "string", "pattern": "^x$"}}}, "#/properties/a/pattern", ""),
        ({"properties": {"a": {"type": "string"}}, "minProperties": 1}, "#/minProperties", ""),
        ({"properties": {"a": {}}, "required": ["b"]}, "#/required", "'b' is none"),
        ({"required": ["b"]}, "#/required", "'b' is none"),
        ({"properties": {"a": {}}, "required": 5}, "#/required", "must be an array"),
        ({"properties": {"a>": {}}}, "#/properties/a>", "name"),
        ({"properties": {"a>": {}}, "required": ["a>"]}, "#/properties/a>", "name"),
        ({"properties": {"a": False}, "required": ["a"]}, "#/properties/a", "no value"),
        ({"properties": {"a": {}, "b": {"$ref": "#/properties/a"}}}, "#/properties/b", "$ref"),
        ({"properties": {"a": {"$ref": "#"}}}, "#/properties/a", "$ref"),
        (
            {"properties": {"a": {"type": "string", "enum": ["long"], "maxLength": 1}}},
            "#/properties/a",
            "got ['long']",
        ),
        (
            {"properties": {"a": {"type": "string", "enum": ["x"], "const": "y"}}},
            "#/properties/a",
            "got ['x']",
        ),
        ({"properties": {"a": {"type": "string", "enum": ["</parameter>"]}}}, "#/properties/a", ""),
        ({"properties": {"a": {"type": "string", "enum": 5}}}, "#/properties/a", "got 5"),
        ({"properties": {"a": {"type": "string", "maxLength": "5"}}}, "#/properties/a", "'5'"),
        (
            {"properties": {"a": {"type": "string", "minLength": 2, "maxLength": 1}}},
            "#/properties/a",
            "minLength (2) is greater",
        ),
    ],
)
def test_what_such_arguments_cannot_keep_is_named(world, schema, place, reason):
    shape = dataclasses.replace(form("qwen3_coder", must_call=True), schemas={"f": schema})
    _, made, _ = world

    def compiled(exact):
        spec = grammar(shape, lambda text: None, exact=exact)
        return made.compile(json.dumps({"grammar": spec})).result(30)

    with pytest.raises(
        ValueError, match=re.escape(f"%json 0: {place}: ") + f".*{re.escape(reason)}"
    ):
        compiled(["f"])
    left_out = "/pattern" in place or "/minP" in place or "none" in reason or reason == "$ref"
    if left_out or (reason == "name" and "required" not in schema):  # nothing fits the others
        assert [place in warning for warning in compiled([]).warnings] == [True]
