"""What is refused, where it says that it is, and which `oneOf` are proved to be `anyOf`."""

import contextlib
import json
import re
import time
from functools import partial

import jsonschema
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.build import BUNDLED_MODEL, read_tokenizer
from minisgl.grammar.backend import LlgBackend
from minisgl.grammar.pattern import safe_pattern
from minisgl.grammar.schema import Reader, Refused
from minisgl.grammar.spec import as_lark, with_schemas_read
from minisgl.server.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def backend():
    made = LlgBackend(partial(read_tokenizer, BUNDLED_MODEL), 2048, [2])
    yield made
    made.close()


def refusal(backend, **spec) -> str:
    error = backend.compile(json.dumps(spec)).exception(30)
    assert isinstance(error, ValueError)
    return str(error)


def fits(backend, schema, text: str) -> bool:
    state = backend.compile(json.dumps({"json": schema})).result(30).copy()
    tokens = Tokenizer.from_directory(BUNDLED_MODEL).encode(text)
    return all(state.accept(token) is None for token in (*tokens, 2))


def nested(schema, depth: int):
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def required(schema):
    return {"type": "object", "properties": {"a": {}, "b": schema}, "required": ["a", "b"]}


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}}, "required": ["next"]}
REFUSED = [
    ({"not": {}}, "#/not: not is not supported"),
    ({"properties": {"a": {"if": True}}}, "#/properties/a/if: if is not supported"),
    ({"items": {"uniqueItems": True}}, "#/items/uniqueItems: uniqueItems is not supported"),
    ({"anyOf": [True, {"format": "ipv5"}]}, "#/anyOf/1/format: format 'ipv5' is not supported"),
    ({"format": ["date"]}, "#/format: format ['date'] is not supported"),
    ({"$defs": {"a": {"x-guidance": {}}}}, "#/$defs/a/x-guidance: x-guidance is not supported"),
    ({"x-guidance": {"lenient": True}}, "#/x-guidance: x-guidance is not supported"),
    ({"properties": {"a": 3}}, "#/properties/a: a schema must be an object or a boolean, got int"),
    ({"properties": []}, "#/properties: must be an object, got list"),
    ({"anyOf": {}}, "#/anyOf: must be an array, got dict"),
    (3, "#: a schema must be an object or a boolean, got int"),
    (False, "#: the schema is unsatisfiable"),
    ({"type": "text"}, "#/type: Invalid type: text"),
    ({"properties": {"a": {"pattern": "(?=b)"}}}, "#/properties/a/pattern: character 0: look-"),
    ({"enum": []}, "#/enum: Unsatisfiable"),
    ({"allOf": [{"type": "null"}, {"type": "string"}]}, "#/allOf: Unsatisfiable"),
    ({"$ref": "#/$defs/absent"}, "#/$ref: Pointer '/$defs/absent' does not exist"),
    ({"$ref": "https://example.com/s"}, "#/$ref: Resource 'https://example.com/s'"),
    ({"items": {"$id": "https://a.b/", "$ref": "c"}}, "#/items/$id: what $ref names beside $id"),
    ({"$ref": "#/$defs/n", "$defs": {"n": NODE}}, "what it requires never ends"),
    ({"$ref": "#"}, "what it requires never ends"),
    ({"items": {"$ref": "#"}, "type": "array", "minItems": 1}, "what it requires never ends"),
    ({"$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(501)}}, "got 501"),
    (nested({}, 61), "schemas may be nested 60 deep"),
    ('{"type"', "Expecting"),
]


@pytest.mark.parametrize(("schema", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_a_schema_is_refused_with_its_place(backend, schema, says):
    found = refusal(backend, json=schema)
    assert found.startswith("structured_outputs.json: ")
    assert says in found
    assert len(found) < 500


CONTRADICTIONS = [
    ({"type": "integer", "minimum": 3, "maximum": 2}, "minimum: .*3.* is greater than maximum"),
    ({"type": "number", "exclusiveMinimum": 3, "maximum": 2}, "exclusiveMinimum: .*greater than"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength: .*3.* is greater than max"),
    ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems: .*3.* is greater than maxItems"),
    ({"type": "object", "minProperties": 3, "maxProperties": 2}, "minProperties: .*maxProp"),
    ({"type": "integer", "minimum": 1.2, "maximum": 1.8}, "minimum: .*no integer"),
    ({"type": "integer", "multipleOf": 5, "minimum": 1, "maximum": 4}, "multipleOf: .*range"),
    ({"type": "string", "enum": [3]}, "enum: .*incompatible types"),
    ({"minLength": 2, "enum": ["a"]}, "minLength: .*match length"),
    ({"type": "array", "minItems": 1, "items": False}, "minItems: .*required item"),
]


@pytest.mark.parametrize(("schema", "says"), CONTRADICTIONS, ids=[s for _, s in CONTRADICTIONS])
def test_a_contradiction_is_found_where_it_stands(backend, schema, says):
    for whole, path in [
        (schema, "#"),
        (required(schema), "#/properties/b"),
        ({"type": "array", "items": required(schema), "minItems": 1}, "#/items/properties/b"),
        ({"anyOf": [{"allOf": [required(schema), {}]}]}, "#/anyOf/0/allOf/0/properties/b"),
        ({"$ref": "#/$defs/x", "$defs": {"x": required(schema)}}, "#/$defs/x/properties/b"),
        (required({"$ref": "#/$defs/y"}) | {"$defs": {"y": schema}}, "#/$defs/y"),
    ]:
        assert re.search(f": {re.escape(path)}/{says}", refusal(backend, json=whole))


def test_what_may_be_left_out_is_not_blamed(backend):
    never = {"type": "string", "minLength": 3, "maxLength": 2}
    schema = {"anyOf": [never, {"type": "null"}], "properties": {"a": never}}
    assert backend.compile(json.dumps({"json": schema})).result(30).warnings == []
    wrong = required({"type": "text"})
    wrong["properties"] = {"optional": never, **wrong["properties"]}
    assert "#/properties/b/type: Invalid type: text" in refusal(backend, json=wrong)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"regex": "a("}, "structured_outputs.regex: character 1: unclosed group, near 'a\\('$"),
        ({"regex": "a/\n\\n\\/b("}, r"regex: character 8: unclosed group, near 'a/\\n"),
        ({"regex": "é" * 90 + "("}, "character 90: unclosed group, near 'é{20}\\('$"),
        ({"regex": "(?<=a)b"}, "structured_outputs.regex: character 0: look-"),
        ({"regex": r"a\b"}, "structured_outputs.regex: lookarounds not supported"),
        ({"grammar": "start: missing"}, ": line 1, column 8: unknown name: .missing.$"),
        ({"grammar": "root ::= x\nx ::= [z-a]"}, "grammar: character 1: invalid character class"),
        ({"grammar": "start.2: /a/"}, "grammar: line 1, column 10: priority not supported yet$"),
        ({"grammar": ""}, "structured_outputs.grammar must be Lark with .* EBNF with .* got ''"),
        ({"grammar": "expr = 1 " * 99}, "must be Lark with a line `start: ...`, .{120,140}$"),
        ({"grammar": "root ::= ("}, "structured_outputs.grammar: "),
        ({"choice": []}, "structured_outputs.choice must hold at least 1 string, got 0"),
        ({"choice": ["a", ""]}, r"structured_outputs.choice\[1\] must be a string .*got ''"),
        ({"choice": ["a" * 4097]}, r"must be a string of 1 to 4096 characters, got 'aaa"),
        ({"grammar": "root ::= " + "'a' " * 9000}, "at most 16384 characters where it is EBNF"),
        ({"choice": [1]}, r"structured_outputs.choice\[0\] must be a string .*got '1'"),
    ],
    ids=lambda given: str(given)[:40],
)
def test_other_kinds_are_refused_by_name(backend, spec, says):
    assert re.search(says, refusal(backend, **spec))


MISREAD = [
    ("[[:^punct:]]", 0, "a class"),
    ('[[^"]]', 0, "a class"),
    ("x[[a]]", 1, "a class"),
    ("[a&&b]", 0, "a class"),
    ("[+--]", 0, "a class"),
    ("[a~~b]", 0, "a class"),
    ("a[^]b", 1, "a class"),
    ("(?ix)[^#]", 0, "the flag x"),
    ("(?P<a[>\\P{Po})]", 0, "a group's name"),
    ('[^"\x01]|\\x01', 6, "U+0001"),
    ("a\x01", 1, "U+0001"),
    ("\\x{0001}", 0, "U+0001"),
]


@pytest.mark.parametrize(("pattern", "at", "says"), MISREAD, ids=[p for p, _, _ in MISREAD])
def test_a_pattern_with_two_readings_is_refused_with_its_place(backend, pattern, at, says):
    found = refusal(backend, json={"items": {"type": "string", "pattern": pattern}})
    assert found.startswith(f"structured_outputs.json: #/items/pattern: character {at}: {says}")
    made = backend.compile(json.dumps({"json": {"pattern": pattern}, "strict": False})).result(30)
    assert says in made.warnings[0]
    named = refusal(backend, json={"patternProperties": {pattern: {}}})
    assert f"character {at}: {says}" in named


# What leaves out a quote: none of these may let one pass that is written with a backslash.
NO_QUOTES = [
    r'^[^"]$',
    r'^[^]"]$',
    r"^\P{Po}$",
    r"^\P{P}$",
    r"^[\P{Po}]$",
    r"^[^\p{Po}-]$",
    r"^\p{Cc}$",
    r'^(?:[^\s"]|\s)$',
    r"^(?:[\x00-\x0f]|[\x10-\x21])$",
    r"^[#-~\x00-\x1f-]$",
    r'^(?<a>[^"])$',
    r"^\pL$",
    r"^\PP$",
]


@pytest.mark.parametrize("pattern", NO_QUOTES)
def test_a_pattern_without_quotes_lets_no_quote_pass(backend, pattern):
    """And lets pass what it has, as another library reads it."""
    schema = {"type": "string", "pattern": pattern}
    assert not fits(backend, schema, '"\\""')
    assert not fits(backend, schema, '"ab"')
    as_python = regex.compile(pattern)
    for character in "a#]-!. é":
        expected = as_python.match(character) is not None
        assert fits(backend, schema, f'"{character}"') == expected, character


def seconds(work) -> float:
    """The least of three, of this thread's own work: others may keep the cores busy."""
    times = []
    for _ in range(3):
        started = time.thread_time()
        with contextlib.suppress(ValueError):
            work()
        times.append(time.thread_time() - started)
    return min(times)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: safe_pattern("[" * n),
        lambda n: safe_pattern("(?<" * n),
        lambda n: safe_pattern("\\p{" * n),
        lambda n: safe_pattern("[]" * n),
        lambda n: with_schemas_read('start: "' + '\\"' * n),
        lambda n: with_schemas_read("start: /" + "\\/" * n),
        lambda n: with_schemas_read("start: " + "%json " * n),
        lambda n: with_schemas_read("start: %json" + " " * n),
        lambda n: as_lark("\n" * n),
        lambda n: as_lark(" \n" * n),
        lambda n: as_lark(" " * n),
        lambda n: as_lark("start\n" * n),
    ],
)
def test_a_text_of_twice_the_size_is_read_in_about_twice_the_time(make, monkeypatch):
    """Python's expressions let no other thread run: the engine would stand still meanwhile."""
    monkeypatch.setattr("minisgl.grammar.pattern.MAX_PATTERN", 2**30)
    monkeypatch.setattr("minisgl.grammar.spec.MAX_EBNF_BYTES", 0)
    assert seconds(lambda: make(64_000)) < 0.005 + 4 * seconds(lambda: make(32_000))


def test_a_long_pattern_is_refused_with_the_numbers(backend):
    found = refusal(backend, json={"pattern": "[" * 130_000})
    assert "#/pattern: must have at most 8192 characters, got 130000" in found


def test_what_is_not_closed_hides_no_schema(backend):
    """Behind it on the same line stands nothing that llguidance would read."""
    for text in ('" ', "/ ", '"\\" ', "a / "):
        made = f'start: {text}%json {{"not": {{}}}}'
        assert refusal(backend, grammar=made).startswith("structured_outputs.grammar: ")


def test_what_is_not_strict_leaves_out_with_a_warning(backend):
    schema = {"type": "array", "uniqueItems": True, "items": {"oneOf": [{}, {"minimum": 3}]}}
    grammar = backend.compile(json.dumps({"json": schema, "strict": False})).result(30)
    first, second = grammar.warnings
    assert first == "#/uniqueItems: uniqueItems is not supported; it is left out"
    assert second.startswith("#/items/oneOf: ")
    assert second.endswith("; it is read as anyOf")
    many = {"properties": {f"p{i}": {"not": {}} for i in range(50)}}
    grammar = backend.compile(json.dumps({"json": many, "strict": False})).result(30)
    assert len(grammar.warnings) == 21
    assert grammar.warnings[-1] == "and 30 more"


def within(*schemas, before=""):
    """A grammar with schemas in it."""
    rules = [f"a{i}: %json {json.dumps(schema)}" for i, schema in enumerate(schemas)]
    names = " ".join(f"a{i}" for i in range(len(schemas)))
    return "\n".join([f"start: {before} {names}", *rules])


@pytest.mark.parametrize(("schema", "says"), REFUSED[:-2], ids=[says for _, says in REFUSED[:-2]])
def test_a_schema_within_a_grammar_is_refused_with_its_place(backend, schema, says):
    if schema == {"x-guidance": {"lenient": True}}:
        says = ""
        schema |= {"x-guidance": {"lenient": True, "coerce_one_of": True}}
    if isinstance(schema, int) and not isinstance(schema, bool):
        says = ""  # no schema at all: llguidance says so
    found = refusal(backend, grammar=within({}, schema))
    assert found.startswith("structured_outputs.grammar: ")
    assert says in found
    assert len(found) < 500
    if says:
        assert found.startswith("structured_outputs.grammar: %json 1: #")


def test_what_only_looks_like_a_schema_is_left_alone(backend):
    texts = ['"%json {\\"not\\": {}}"', '"\\"" /%json {2}/ "//"', '"x" // %json {\n |']
    for text in texts:
        made = backend.compile(json.dumps({"grammar": within({"not": {}}, before=text)}))
        assert "%json 0: #/not" in str(made.exception(30))
        assert backend.compile(json.dumps({"grammar": within({}, before=text)})).result(30)
    lenient = {"not": {}, "x-guidance": {"lenient": True}}
    made = backend.compile(json.dumps({"grammar": within(lenient, True, {})})).result(30)
    place = "structured_outputs.grammar: %json 0: #/not"
    assert made.warnings == [f"{place}: not is not supported; it is left out"]


def test_a_schema_within_a_grammar_has_the_same_instances(backend):
    state = backend.compile(json.dumps({"grammar": within(ONE_OF, before='"x"')})).result(30).copy()
    tokenizer = Tokenizer.from_directory(BUNDLED_MODEL)
    text = 'x{ "a": "b"'
    assert [state.accept(i) for i in tokenizer.encode(text)] == [None] * len(tokenizer.encode(text))
    assert state.accept(tokenizer.encode("\n\n")[0])  # one blank, where JSON may have some


ONE_OF = {
    "oneOf": [
        {"type": "object", "properties": {"a": {"const": "b"}}, "required": ["a"]},
        {"type": "null"},
    ]
}


def test_what_asks_for_nothing_is_no_reason_to_refuse(backend):
    schema = {"uniqueItems": False, "dependentRequired": {}, "title": "t", "deprecated": True}
    assert backend.compile(json.dumps({"json": schema})).result(30).warnings == []


def tagged(tag: str, **more):
    return {"type": "object", "properties": {"t": {"const": tag}, **more}, "required": ["t"]}


DEFS = {"$defs": {"a": tagged("a"), "b": {"allOf": [tagged("b"), {"title": "B"}]}}}
EXCLUDE = [
    [{"type": "string"}, {"type": ["integer", "null"]}],
    [{"const": 1}, {"enum": [2, "1"]}],
    [tagged("a"), tagged("b")],
    [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
    [{"anyOf": [tagged("a"), tagged("c")]}, tagged("b")],
    [tagged("a"), {"type": "object", "additionalProperties": False}],
]
OVERLAP = [
    [{"type": "number"}, {"type": "integer"}],
    [{"const": 1}, {"const": 1.0}],
    [{"enum": [True, 2]}, {"type": ["boolean", "null"]}],
    [{"required": ["a"]}, {"required": ["b"]}],
    [tagged("a"), {"properties": {"t": {"const": "b"}}, "required": ["t"]}],  # 3 fits the second
    [tagged("a"), {"type": "object", "properties": {"t": {"type": "string"}}}],
    [{"type": "array", "items": {"const": 1}}, {"type": "array", "items": {"const": 2}}],  # []
    [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}],
    [{"$ref": "#/$defs/absent"}, {"type": "null"}],
]


@pytest.mark.parametrize("branches", EXCLUDE, ids=str)
def test_one_of_is_any_of_where_it_is_proved(branches):
    read = Reader({"oneOf": branches, **DEFS}, strict=True).read()
    assert len(read["oneOf"]) == len(branches)


@pytest.mark.parametrize("branches", OVERLAP, ids=str)
def test_one_of_that_may_overlap_is_refused_with_its_place(branches):
    with pytest.raises(Refused, match=r"#/properties/x/oneOf: .* 0 and 1 are not proved"):
        Reader({"properties": {"x": {"oneOf": branches}}, **DEFS}, strict=True).read()


def test_one_of_behind_a_changed_base_is_not_proved():
    """`#` is the schema with the `$id` there; for the root, its own changes nothing."""
    inner = {
        "$id": "https://example.com/inner",
        "$defs": {"a": tagged("b"), "b": tagged("b")},
        "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
    }
    with pytest.raises(Refused, match=r"#/properties/x/oneOf: .* 0 and 1 are not proved"):
        Reader({"properties": {"x": inner}, **DEFS}, strict=True).read()
    own = {"$id": "https://example.com/root", "oneOf": inner["oneOf"], **DEFS}
    assert "oneOf" in Reader(own, strict=True).read()


def test_one_of_beside_other_branches_keeps_them_all(backend):
    one, some, all_of = (
        [{"type": "string"}, {"type": "null"}],
        [{"enum": [1, "a"]}, {"const": None}],
        [True],
    )
    for schema in (
        {"oneOf": one, "anyOf": some, "allOf": [{"enum": ["a", 1, None]}]},
        {"allOf": [{"enum": ["a", 1, None]}], "anyOf": some, "oneOf": one},
        {"anyOf": some, "oneOf": one, "allOf": [*all_of, {"enum": ["a", 1, None]}]},
    ):
        validator = jsonschema.Draft202012Validator(schema)
        for value in ("a", None, 1, "b", 2):
            assert fits(backend, schema, json.dumps(value)) == validator.is_valid(value), value


SIMPLE = st.sampled_from(
    [{"type": t} for t in ("null", "boolean", "integer", "number", "string", "array", "object")]
    + [{"const": c} for c in (None, True, 1, 1.0, 0, "a", [1], {"t": "a"})]
    + [
        {"enum": [1, "a", None]},
        {"enum": ["b", 2.5]},
        {"type": ["string", "null"]},
        {},
        True,
        False,
    ]
)
SCHEMAS = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.fixed_dictionaries({"anyOf": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries({"allOf": st.lists(inner, min_size=1, max_size=2)}),
        st.fixed_dictionaries(
            {
                "type": st.just("object"),
                "properties": st.dictionaries(st.sampled_from("tu"), inner, max_size=2),
                "required": st.lists(st.sampled_from("tu"), max_size=2, unique=True),
                "additionalProperties": st.booleans(),
            }
        ),
    ),
    max_leaves=6,
)
VALUES = st.recursive(
    st.sampled_from([None, True, False, 0, 1, 1.0, 2.5, "a", "b", ""]),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("tu"), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(SCHEMAS, SCHEMAS, st.lists(VALUES, min_size=20, max_size=20))
def test_no_value_fits_two_branches_that_are_said_to_exclude_each_other(a, b, values):
    read = Reader({"oneOf": [a, b]}, strict=False)
    try:
        read.read()
    except Refused:
        return  # unsatisfiable
    if not read.warnings:
        fits = [jsonschema.Draft202012Validator(branch).is_valid for branch in (a, b)]
        assert not any(all(fit(value) for fit in fits) for value in values)
