"""What a model wrote gives the same reasoning, text and calls however it is cut."""

import json
import sys
from dataclasses import dataclass, field, fields
from typing import get_args

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minisgl.config import ServerConfig
from minisgl.server.answer import REASONING_FORMATS, AnswerForm, AnswerParser, chosen, told
from minisgl.server.tool_formats import TOOL_FORMATS

FORMATS = sorted(TOOL_FORMATS)
TEXT = {"properties": {"text": {"type": "string"}}}
SCHEMAS = {"look_up": TEXT, "clock": TEXT, "a.b-c": TEXT}


@dataclass
class Read:
    """An answer, put together again."""

    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    has_calls: bool = False

    def take(self, news):
        for kind, text, call in news:
            if kind == "name":
                assert call == len(self.calls)
                self.calls.append([text, ""])
            elif kind == "arguments":
                assert call == len(self.calls) - 1
                self.calls[call][1] += text
            else:
                setattr(self, kind, getattr(self, kind) + text)

    @property
    def values(self):
        return [(name, json.loads(arguments)) for name, arguments in self.calls]


def form(tools=None, reasoning=None, schemas=SCHEMAS, **options):
    return AnswerForm(REASONING_FORMATS.get(reasoning), TOOL_FORMATS.get(tools), schemas, **options)


def read(pieces, *args, **options):
    parser, found = AnswerParser(form(*args, **options)), Read()
    for piece in pieces:
        news = parser.push(piece)
        assert all(n.text for n in news)
        found.take(news)
    found.take(parser.end())
    found.has_calls = parser.has_calls
    return found


def cuts(text, draw):
    places = draw(st.lists(st.integers(0, len(text)), max_size=12).map(sorted))
    ends = [*places, len(text)]
    return [text[a:b] for a, b in zip([0, *places], ends, strict=True)]


# ---- calls as models write them --------------------------------------------------------------

characters = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
QUOTED = [*"{}[]\"'\\),xé🚀", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>"]
QUOTED += ["</function>", "</parameter>", "</think>"]
quoting = st.lists(st.sampled_from([*QUOTED, "\n", " "]), max_size=8).map("".join)
strings = characters | quoting
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | strings,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(strings, inner, max_size=3)
        | st.floats(allow_nan=False, allow_infinity=False)
    ),
    max_leaves=6,
)
keys = st.from_regex(r"[a-z_][a-z0-9_]{0,6}", fullmatch=True).filter(
    lambda key: key not in ("text", "number")
)
ends_xml = ("</parameter><parameter=", "</parameter></function>")
plain = strings.filter(lambda s: not any(m in "".join(s.split()) for m in ends_xml))
calls = st.lists(
    st.tuples(
        st.sampled_from(sorted(SCHEMAS)),
        st.fixed_dictionaries({}, optional={"text": plain}),
        st.dictionaries(keys, values, max_size=3),
    ),
    min_size=1,
    max_size=3,
)


def xml(name, texts, others):
    values = texts | {key: json.dumps(value) for key, value in others.items()}
    given = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items()]
    return f"<tool_call>\n<function={name}>\n{''.join(given)}</function>\n</tool_call>"


def wrote(tools, draw, called):
    """The calls as a model of this form writes them."""
    indent = draw(st.sampled_from([None, 2]))

    def as_json(key="arguments"):
        for name, texts, others in called:
            members = {"name": name, key: texts | others}
            yield json.dumps(members, indent=indent, ensure_ascii=draw(st.booleans()))

    if tools == "hermes":
        return "\n".join(f"<tool_call>\n{text}\n</tool_call>" for text in as_json())
    if tools == "llama3_json":
        tag = draw(st.sampled_from(["", "<|python_tag|>"]))
        return tag + draw(st.sampled_from(["; ", ";", "\n; "])).join(as_json("parameters"))
    if tools == "mistral":
        if draw(st.booleans()):
            return f"[TOOL_CALLS][{', '.join(as_json())}]"
        middle = draw(st.sampled_from(["", "[ARGS]", "[CALL_ID]a1B2c3D4e[ARGS]"]))
        return "".join(
            f"[TOOL_CALLS]{name}{middle}{json.dumps(texts | others, indent=indent)}"
            for name, texts, others in called
        )
    if tools == "qwen3_coder":
        return "\n".join(xml(*call) for call in called)
    inside = ", ".join(
        f"{name}({', '.join(f'{k}={v!r}' for k, v in (texts | others).items())})"
        for name, texts, others in called
    )
    marks = draw(st.sampled_from([("", ""), ("<|python_start|>", "<|python_end|>")]))
    return f"{marks[0]}[{inside}]{marks[1]}"


@pytest.mark.parametrize("tools", FORMATS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_calls_are_what_was_called_however_the_text_is_cut(tools, data):
    called = data.draw(calls)
    written = wrote(tools, data.draw, called)
    if tools == "qwen3_coder":  # whose texts have no escapes: what looks like their end is it
        assume(not any(mark in json.dumps([*called]) for mark in ends_xml))
    is_bare = not written.startswith(TOOL_FORMATS[tools].opens)
    text = "" if is_bare else data.draw(st.sampled_from(["", "I look it up.\n\n", "a < b "]))
    thought = data.draw(st.sampled_from(["", "Shall I? <tool_call> [ {", "hm"]))
    before = f"<think>\n{thought}\n</think>\n\n" if thought else ""
    found = read(cuts(before + text + written, data.draw), tools, "think")
    expected = [(name, texts | others) for name, texts, others in called]
    assert found.values == expected
    assert (found.text, found.reasoning) == (text.rstrip(), thought)
    assert found.has_calls


pieces = st.sampled_from(
    [mark for f in TOOL_FORMATS.values() for mark in (*f.opens, f.closes, *f.inner)]
    + ["<think>", "</think>", "<function=look_up>", "<parameter=text>", "</parameter>", "<"]
    + ['{"name": "clock", "arguments": ', '{"a": 1}', "{", "}", "[", "]", "clock(", "a=", ")"]
    + ["</function>", '"', "'", "\\", ",", ";", ":", "\n", " ", "x", "é", "1", "None", "\\ud83d"]
)


@pytest.mark.parametrize("tools", FORMATS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_anything_at_all_reads_the_same_however_it_is_cut(tools, data):
    text = "".join(data.draw(st.lists(pieces, max_size=25)))
    options = {
        "is_open": data.draw(st.booleans()),
        "most_calls": data.draw(st.sampled_from([1, 9])),
    }
    whole = read([text], tools, "think", **options)
    assert read(text, tools, "think", **options) == whole
    assert read(cuts(text, data.draw), tools, "think", **options) == whole
    json.dumps(whole.calls).encode()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_without_calls_and_reasoning_no_character_is_lost(data):
    text = "".join(data.draw(st.lists(pieces, max_size=25)))
    assert read(cuts(text, data.draw)).text == text
    found = read(cuts("." + text, data.draw), data.draw(st.sampled_from(FORMATS)), "think")
    if not found.calls:
        assert found.text == "." + text


# ---- what stands where -----------------------------------------------------------------------

HERMES = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("tools", "text", "said", "called"),
    [
        ("hermes", HERMES + HERMES, "", [("clock", {})] * 2),
        ("hermes", f"One: {HERMES}\nTwo.", "One:\nTwo.", [("clock", {})]),
        ("hermes", '<tool_call>{"name": "clock"}</tool_call>', "", [("clock", {})]),
        ("hermes", '<tool_call>{"arguments": {}, "name": "clock"}', "", [("clock", {})]),
        ("hermes", '<tool_call>{"name": "clock", "arguments": null}', "", [("clock", {})]),
        ("hermes", '<tool_call>{"name": "clock", "arguments": "{}"}', "", [("clock", {})]),
        ("hermes", HERMES.replace("}}", "}") + ".", ".", [("clock", {})]),
        ("hermes", '<tool_call>{"name": "not there", "arguments": {}}', None, []),
        ("hermes", '<tool_call>{"name": 5, "arguments": {}}', None, []),
        ("hermes", "Write <tool_call> before a call, </tool_call> behind it.", None, []),
        ("hermes", '<tool_call>{"nam', None, []),
        ("hermes", "<<tool_<tool_call", None, []),
        ("llama3_json", '{"name": "someone", "parameters": {}}', None, []),
        ("llama3_json", '{"name": ["clock"]}', None, []),
        ("llama3_json", 'It is {"name": "clock", "parameters": {}}', None, []),
        ("llama3_json", '{"type": "function", "name": "clock"}', "", [("clock", {})]),
        ("llama3_json", "<|python_tag|>print(1)", None, []),
        ("mistral", "[TOOL_CALLS] [ ]", None, []),
        ("mistral", "[TOOL_CALLS]clock [1]", None, []),
        ("pythonic", "[clock(1)]", None, []),
        ("pythonic", "[1, 2]", None, []),
        ("pythonic", "[print(a=1)]", None, []),
        ("pythonic", "[clock()]", "", [("clock", {})]),
        ("pythonic", "[clock(a=.5, b=(1, 2,), c={1: [None]}, d=word)]", "",
         [("clock", {"a": 0.5, "b": [1, 2], "c": {"1": [None]}, "d": "word"})]),
        ("pythonic", r"[clock(a='\ud83d\ude00\x41\q\'')]", "", [("clock", {"a": "😀A\\q'"})]),
        ("qwen3_coder", "<tool_call>\n<function=not there>", None, []),
    ],
)  # fmt: skip
def test_edges(tools, text, said, called):
    for cut in ([text], text):
        found = read(cut, tools)
        assert found.text == (text if said is None else said)
        assert found.values == called
        assert found.has_calls == bool(called)


@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        ({"type": "string"}, "5", "5"),
        ({"type": "integer"}, "5", 5),
        ({"type": "integer"}, "five", "five"),
        ({"type": "boolean"}, "True", True),
        ({"type": ["string", "null"]}, "null", None),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, "5", "5"),
        ({"anyOf": [{"type": "string"}, {"type": "number"}]}, "5", 5),
        ({"$ref": "#/$defs/a"}, '{"a": [1]}', {"a": [1]}),
        ({"type": "object"}, "{'a': 1}", "{'a': 1}"),
        ({"type": 5}, "x", "x"),
        (None, "NaN", "NaN"),
        ({"anyOf": 5, "oneOf": [5]}, "[1]", [1]),
        ([], "[1]", [1]),
    ],
)
def test_values_in_xml_are_of_their_schemas_types(schema, written, value):
    text = xml("f", {"x": written}, {})
    assert read(text, "qwen3_coder", schemas={"f": {"properties": {"x": schema}}}).values == [
        ("f", {"x": value})
    ]


def test_a_call_that_breaks_off_is_no_call_to_the_end():
    for tools, text in [
        ("hermes", HERMES[:-20] + HERMES + '<tool_call>{"name": "clock", "arguments": {"a'),
        ("pythonic", "[clock(a=1"),
        ("pythonic", "[clock(a=1]"),
        ("qwen3_coder", "<tool_call><function=clock><parameter=a>"),
        ("qwen3_coder", "<tool_call><function=clock><parameter=a</tool_call>\n"),
        ("mistral", "[TOOL_CALLS]clock{"),
    ]:
        found = read(text, tools)
        assert found.calls
        assert not found.has_calls


def test_calls_beyond_the_most_are_left_out():
    found = read(f"a {HERMES}{HERMES} b", "hermes", most_calls=1)
    assert (found.text, found.values, found.has_calls) == ("a b", [("clock", {})], True)


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (False, False)])
def test_what_is_not_shown_changes_no_finish_reason(first, second):
    broken = "<tool_call><function=clock><parameter=a\n</tool_call>\n"
    whole = xml("clock", {"a": "1"}, {})
    text = (whole if first else broken) + (whole if second else broken)
    found = read(text, "qwen3_coder", most_calls=1)
    assert (len(found.calls), found.has_calls) == (1, first)


@pytest.mark.parametrize("tools", ["hermes", "mistral"])
def test_a_text_that_is_held_has_no_calls_within(tools):
    (mark,) = TOOL_FORMATS[tools].opens
    call = STREAMS[tools] % "x"
    for text in (json.dumps({"a": call}), f'["{mark}f{{}}"]', f" {call}", "[", "[]", "", "1"):
        for cut in ([text], text):
            found = read(cut, tools, holds_text=True)
            assert (found.text, found.calls) == (text, [])
    for thought in ("", "<think>x</think>\n"):
        found = read(thought + call * 2, tools, "think", holds_text=True)
        assert (found.text, found.values) == ("", [("look_up", {"text": "x"})] * 2)
    found = read(f'<think>x</think>\n{{"a": "{mark}f{{}}"}}', tools, "think", holds_text=True)
    assert (found.text, found.calls) == (f'{{"a": "{mark}f{{}}"}}', [])


@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "said"),
    [
        ("<think>a</think>b", False, "a", "b"),
        ("\n<think>\n a\n\n</think>\n\nb ", False, "a", "b "),
        ("a</think>b", True, "a", "b"),
        ("<think>a</think>b", True, "a", "b"),
        ("never closed </thin", True, "never closed </thin", ""),
        ("<think> never closed\n", False, "never closed", ""),
        ("<think></think>b", False, "", "b"),
        (" <thi", False, "", " <thi"),
        ("Write <think> and </think>.", False, "", "Write <think> and </think>."),
        ("<think>a</think>b <think>c</think>", False, "a", "b <think>c</think>"),
        ("<think>a <think> b</think>c", False, "a <think> b", "c"),
    ],
)
def test_reasoning_stands_at_the_beginning(text, is_open, reasoning, said):
    for cut in ([text], text):
        found = read(cut, None, "think", is_open=is_open)
        assert (found.reasoning, found.text) == (reasoning, said)


def test_a_form_is_known_by_its_templates_words():
    for tools in TOOL_FORMATS.values():
        assert chosen("auto", TOOL_FORMATS, f"{{% if tools %}}{tools.sign}") is tools
    both = "<tool_call>\n<function=name>"
    assert chosen("auto", TOOL_FORMATS, both) is TOOL_FORMATS["qwen3_coder"]
    assert chosen("hermes", TOOL_FORMATS, both) is TOOL_FORMATS["hermes"]
    assert chosen("none", TOOL_FORMATS, both) is None
    assert chosen("auto", TOOL_FORMATS, "plain") is None
    assert chosen("auto", REASONING_FORMATS, "<think>") is REASONING_FORMATS["think"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("auto", "hermes (the chat template holds <tool_call>)"),
        ("mistral", "mistral (as asked)"),
        ("none", "none (as asked)"),
    ],
)
def test_what_was_chosen_is_told_with_its_reason(name, words):
    form = chosen(name, TOOL_FORMATS, "calls in <tool_call> tags")
    assert told(name, TOOL_FORMATS, form) == words


def test_the_flags_name_every_form():
    for flag, formats in (
        ("tool_call_parser", TOOL_FORMATS),
        ("reasoning_parser", REASONING_FORMATS),
    ):
        (kind,) = (item.type for item in fields(ServerConfig) if item.name == flag)
        assert get_args(kind) == ("auto", "none", *formats)


# ---- long answers ----------------------------------------------------------------------------

LONG = "lorem ipsum < 5 } ] ) " * 500
STREAMS = {
    "hermes": '<tool_call>{"name": "look_up", "arguments": {"text": "%s"}}',
    "llama3_json": '{"name": "look_up", "parameters": {"text": "%s"}}',
    "mistral": '[TOOL_CALLS]look_up[ARGS]{"text": "%s"}',
    "pythonic": "[look_up(text='%s')]",
    "qwen3_coder": "<tool_call><function=look_up><parameter=text>%s</parameter></function>",
}


@pytest.mark.parametrize("tools", FORMATS)
def test_a_long_argument_streams_as_it_comes(tools):
    before, after = STREAMS[tools].split("%s")
    parser, found = AnswerParser(form(tools)), Read()
    found.take(parser.push(before))
    for count, char in enumerate(LONG, start=1):
        found.take(parser.push(char))
        assert len(found.calls[0][1]) >= count
    found.take([*parser.push(after), *parser.end()])
    assert found.values == [("look_up", {"text": LONG})]


def work(text, size, *args):
    """Calls, and resumed generators, that reading a text in pieces takes."""
    parser, count = AnswerParser(form(*args)), 0

    def counted(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(counted)
    try:
        for start in range(0, len(text), size):
            parser.push(text[start : start + size])
        parser.end()
    finally:
        sys.setprofile(None)
    return count


HOSTILE = {
    "spaces": lambda n: " " * n + "x",
    "angles": lambda n: "<" * n,
    "marks": lambda n: "<tool_call>" * (n // 10),
    "no end of a header": lambda n: '<tool_call>{"type": "' + "x" * n,
    "arguments first": lambda n: '<tool_call>{"arguments": {"a": "%s"}}' % ("x" * n),
    "depth": lambda n: '<tool_call>{"name": "clock", "arguments": ' + '{"a":[' * (n // 6),
    "parameters": lambda n: "<tool_call><function=f><parameter=a>" + "</parameter>\n" * (n // 12),
    "brackets": lambda n: "[clock(a=" + "[" * n,
    "backslashes": lambda n: "[clock(a='" + "\\" * n,
    "calls": lambda n: HERMES * (n // 57),
    "reasoning": lambda n: "<think>" + "</thin " * (n // 7),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 10**9])
@pytest.mark.parametrize("name", HOSTILE)
def test_the_work_is_linear_in_the_text(name, size):
    tools = {"parameters": "qwen3_coder", "brackets": "pythonic", "backslashes": "pythonic"}
    args = tools.get(name, "hermes"), "think"
    small, large = (work(HOSTILE[name](n), size, *args) for n in (1_000, 10_000))
    assert large < 11 * small + 200
