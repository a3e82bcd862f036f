"""The backend against Python's own regular expressions and a JSON-schema validator."""

import json
import random
import shutil
import threading
import time
from functools import partial

import numpy as np
import pytest
import regex
from llguidance import LLMatcher

from minisgl.build import BUNDLED_MODEL, read_tokenizer
from minisgl.core.grammar import Wanted
from minisgl.core.request import Request, SamplingParams
from minisgl.engine.compiling import Compiling
from minisgl.grammar.backend import BYTES_BESIDES, LlgBackend
from minisgl.server.tokenizer import Tokenizer

VOCAB, END = 2048, 2
EVERY = 2**32 - 1


@pytest.fixture(scope="module")
def backend():
    made = LlgBackend(partial(read_tokenizer, BUNDLED_MODEL), VOCAB, [END])
    yield made
    made.close()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_directory(BUNDLED_MODEL)


def grammar_of(backend, **spec):
    return backend.compile(json.dumps(spec)).result(30).copy()


def masks(backend, *wanted, rows=None):
    rows = rows or sum(1 + len(w.drafts) for w in wanted)
    bits = np.full((rows, VOCAB // 32), EVERY, np.uint32)
    assert backend.fill_masks(wanted, bits) == {}
    return bits


def allowed(row: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist())


def allowed_next(backend, grammar) -> set[int]:
    return allowed(masks(backend, Wanted(grammar, 0, []))[0])


EXPRESSIONS = ["(ab|cd)*e?", "[a-z]{3}-[0-9]{2,4}", "a+b+c+", "x|xy|xyz", "[^a]*a[^a]{2}"]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_masks_are_what_brute_force_allows(backend, tokenizer, expression):
    """Every token at every state of random texts, by partial matches of another library."""
    spelled = [tokenizer.token_bytes(i) for i in range(VOCAB)]
    special = {i for i in range(VOCAB) if tokenizer.is_special(i)}
    pattern, generator = regex.compile(expression), random.Random(0)
    for _ in range(4):
        grammar, text = grammar_of(backend, regex=expression), ""
        for _ in range(8):
            found = allowed_next(backend, grammar)
            for token, piece in enumerate(spelled):
                if token in special:
                    may = token == END and pattern.fullmatch(text) is not None
                elif piece.isascii():
                    whole = text + piece.decode()
                    may = bool(piece) and pattern.fullmatch(whole, partial=True) is not None
                else:  # parts of characters are not the other library's
                    continue
                assert (token in found) == may, (text, token, piece)
            choices = sorted(t for t in found - {END} if spelled[t].isascii())
            if not choices:
                break
            token = generator.choice(choices)
            assert grammar.accept(token) is None
            text += spelled[token].decode()


def test_masks_along_drafts_are_those_of_single_steps(backend, tokenizer):
    """Of drafts that are right, wrong, the end or behind it; the state stays as it is."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammar, plain = grammar_of(backend, json=schema), grammar_of(backend, regex="ab")
    whole = [*tokenizer.encode('{"a":12}', add_special_tokens=False), END]
    wrong = [*whole[:2], whole[0], whole[1]]
    for drafts, right in (
        (whole, len(whole)),
        (wrong, 2),
        ([END, 5], 0),
        ([*whole, 5], len(whole)),
    ):
        for _ in range(2):
            rows = 1 + len(drafts)
            bits = masks(
                backend, Wanted(plain, rows, []), Wanted(grammar, 0, drafts), rows=rows + 1
            )
            single = grammar.copy()
            for row, draft in enumerate([*drafts[:right], -1]):
                if row and drafts[row - 1] == END:
                    break  # discarded
                assert allowed(bits[row]) == allowed_next(backend, single)
                if draft >= 0:
                    assert single.accept(draft) is None
            assert (bits[right + 1 : rows] == EVERY).all()
            assert allowed(bits[rows]) == allowed_next(backend, plain)


FORCING = {"a_long_name": {"const": "of fixed text"}, "ab": {"enum": ["x1", "x2"]}, "c": {}}


def test_forced_tokens_are_those_that_masks_allow_alone(backend, tokenizer):
    """At every state of random texts, and the state stays as it is; many are forced at once."""
    names = [*FORCING]
    schema = {"properties": FORCING, "required": names, "additionalProperties": False}
    generator, longest = random.Random(0), 0
    for _ in range(8):
        grammar = grammar_of(backend, json={"type": "object", **schema})
        for _ in range(60):
            run, single = grammar.forced(64), grammar.copy()
            assert grammar.forced(3) == run[:3]
            longest = max(longest, len(run))
            for token in run:
                assert allowed_next(backend, single) == {token}
                assert single.accept(token) is None
            token = generator.choice(sorted(allowed_next(backend, grammar)))
            if token == END:
                break
            assert grammar.accept(token) is None
    assert longest > 5
    ended = grammar_of(backend, choice=["a"])
    assert ended.forced(64)[-1] == END
    assert END not in ended.copy(END + 1).forced(64)  # which of two is for the model to say


def test_a_text_may_end_only_where_the_grammar_may(backend, tokenizer):
    grammar = grammar_of(backend, regex="ab?")
    assert END not in allowed_next(backend, grammar)
    assert "ends before it may" in grammar.accept(END)
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    assert grammar.accept(a) is None
    assert END in allowed_next(backend, grammar)
    assert "not allowed" in grammar.accept(a)
    assert grammar.accept(END) is None
    ended = grammar_of(backend, choice=["a"])
    assert ended.accept(a) is None
    assert allowed_next(backend, ended) == {END}


def test_a_limit_of_the_parser_is_told_and_spoils_no_other_mask(backend, tokenizer):
    heavy = grammar_of(backend, regex="(a{1,1000}){1,1000}")
    (a,) = tokenizer.encode("a", add_special_tokens=False)
    fine = grammar_of(backend, choice=["a"])
    expected = allowed_next(backend, fine)
    failed: dict[int, str] = {}
    for _ in range(2000):
        bits = np.full((4, VOCAB // 32), EVERY, np.uint32)
        failed = backend.fill_masks([Wanted(heavy, 0, [a, a]), Wanted(fine, 3, [])], bits)
        assert allowed(bits[3]) == expected
        reason = heavy.accept(a)
        if failed:
            break
        assert reason is None
    assert failed == {0: reason}
    assert "too many expressions" in reason
    assert "a‧a" not in reason  # errors do not repeat what was generated


def test_choices_are_taken_letter_by_letter(backend, tokenizer):
    texts = ["a.b", "a|b", "(", "ü\n€", "\\d", "^$", 'a"b', "-]", "~/#&", "\x07 ", "naïve 😀"]
    for text in texts:
        for others in ([], texts):
            grammar = grammar_of(backend, choice=[text, *others])
            for token in tokenizer.encode(text, add_special_tokens=False):
                assert grammar.accept(token) is None, text
            assert END in allowed_next(backend, grammar)
    grammar = grammar_of(backend, choice=["a.b"])
    for token in tokenizer.encode("a", add_special_tokens=False):
        assert grammar.accept(token) is None
    (x,) = tokenizer.encode("x", add_special_tokens=False)
    assert "not allowed" in grammar.accept(x)


@pytest.mark.parametrize("indent", [None, 2, 4])
@pytest.mark.parametrize("separators", [None, (",", ":"), (",", ": ")])
def test_json_as_people_write_it_fits_and_endless_blanks_do_not(
    backend, tokenizer, indent, separators
):
    grammar = grammar_of(backend, json_object=True)
    value = {"a": [1, {"b": [{"c": []}]}], "d": {"e": "x\n\u00e9\u0001"}, "f": -1.5e3, "g": None}
    text = json.dumps(value, indent=indent, separators=separators, ensure_ascii=False)
    for token in tokenizer.encode(text, add_special_tokens=False):
        assert grammar.accept(token) is None
    assert grammar.accept(END) is None
    for blank in (" ", "\n"):
        grammar = grammar_of(backend, json_object=True)
        tokens = tokenizer.encode("{" + blank * 60, add_special_tokens=False)
        assert any(grammar.accept(token) is not None for token in tokens)


@pytest.mark.parametrize("indent", [2, 4])
def test_a_schema_leaves_room_for_its_own_indentation_and_little_more(backend, tokenizer, indent):
    inner = {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}
    schema = {"type": "object", "properties": {"a": inner}, "required": ["a"]}
    text = json.dumps({"a": [[1, 2], [3]]}, indent=indent)
    for blanks, fits in ((0, True), (20, False)):
        grammar = grammar_of(backend, json=schema)
        spread = text.replace(" 1,", " " * blanks + " 1,")
        tokens = tokenizer.encode(spread, add_special_tokens=False)
        assert all(grammar.accept(token) is None for token in tokens) == fits


def test_a_content_is_compiled_once_and_kept_within_its_bytes(tmp_path):
    small = LlgBackend(
        partial(read_tokenizer, BUNDLED_MODEL),
        VOCAB,
        [END],
        cache_bytes=3 * BYTES_BESIDES + 3 * 64 * 40,
    )
    specs = [json.dumps({"regex": f"a{i}"}) for i in range(4)]
    first = [small.compile(spec) for spec in specs[:3]]
    assert [small.compile(spec) for spec in specs[:3]] == first
    small.compile(specs[3])  # the one used least lately goes
    assert small.compile(specs[1]) is first[1]
    assert small.compile(specs[0]) is not first[0]
    refused = small.compile(json.dumps({"regex": "("}))
    assert refused.exception(30) is not None
    assert small.compile(json.dumps({"regex": "("})) is not refused
    small.close()


def test_what_is_too_large_is_refused_with_the_numbers(tmp_path):
    small = LlgBackend(partial(read_tokenizer, BUNDLED_MODEL), VOCAB, [END], max_bytes=100)
    with pytest.raises(ValueError, match=r"at most 100 bytes.*--grammar-max-bytes.*got 213"):
        small.compile(json.dumps({"regex": "a" * 200})).result(30)
    small.close()


def test_what_nobody_waits_for_is_not_compiled(monkeypatch):
    """What is queued is cancelled, and compiled for one who asks for it later."""
    begun, go_on = [], threading.Event()

    def compile_spec(spec, make):
        begun.append(spec)
        assert go_on.wait(30)
        return make(LLMatcher.grammar_from_regex("a")), []

    monkeypatch.setattr("minisgl.grammar.backend.compile_spec", compile_spec)
    made = LlgBackend(partial(read_tokenizer, BUNDLED_MODEL), VOCAB, [END])
    waiting = Compiling(made)
    specs = [f'{{"regex":"{each}"}}' for each in "abcde"]
    for spec in specs:
        waiting.add(Request(spec, [1], SamplingParams(structured_outputs=spec)))
    waiting.add(Request("d too", [1], SamplingParams(structured_outputs=specs[3])))
    for name in (*specs[2:4], specs[4]):
        waiting.drop(name)
    last = made.compile(specs[4])
    go_on.set()
    last.result(30)
    made.close()
    assert sorted(begun) == sorted([*specs[:2], specs[3], specs[4]])


def test_ends_and_special_tokens_are_those_of_the_server(tmp_path):
    """The tokenizer's end besides the model's, and marks that its config alone names."""
    spelled = json.loads((BUNDLED_MODEL / "tokenizer.json").read_text())
    texts = {each["id"]: each["content"] for each in spelled["added_tokens"]}
    for each in spelled["added_tokens"]:
        each["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spelled))
    model_end, mark, end = 0, 1, END
    beyond = "<beyond the model's vocabulary>"
    config = {"eos_token": texts[end], "additional_special_tokens": [texts[mark], beyond]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    made = LlgBackend(partial(read_tokenizer, tmp_path), VOCAB, [model_end])
    grammar = grammar_of(made, regex=".{3}|<.*")
    assert allowed_next(made, grammar).isdisjoint({end, mark, model_end})
    assert "ends before it may" in grammar.accept(end)
    own = grammar.copy(301)
    assert "ends before it may" in own.accept(301)
    for token in Tokenizer.from_directory(tmp_path).encode("abc", add_special_tokens=False):
        assert grammar.accept(token) is None
    assert allowed_next(made, grammar) == {end, model_end}
    assert grammar.accept(end) is None
    made.close()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": texts[end]}))
    alone = LlgBackend(partial(read_tokenizer, tmp_path), VOCAB, [])
    assert grammar_of(alone, regex="a").ends == {end}
    alone.close()


@pytest.mark.parametrize(
    ("model", "ends", "says"),
    [
        ("absent", [END], "needs a tokenizer.json, and .*/absent has none"),
        (".", [], "needs a model that names its end-of-text tokens"),
    ],
)
def test_a_model_that_cannot_be_constrained_says_so(tmp_path, model, ends, says):
    shutil.copy(BUNDLED_MODEL / "tokenizer.json", tmp_path)  # and no config
    unable = LlgBackend(partial(read_tokenizer, tmp_path / model), VOCAB, ends)
    with pytest.raises(ValueError, match=says):
        unable.compile(json.dumps({"regex": "a"})).result(30)
    unable.close()


def test_a_long_compilation_does_not_hold_pythons_lock(backend):
    """Another thread goes on within a fraction of the time that the compilation takes."""
    spec = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2500)}}
    gaps, done = [0.0], threading.Event()

    def watch() -> None:
        last = time.perf_counter()
        while not done.wait(0.001):
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    watching = threading.Thread(target=watch)
    watching.start()
    started = time.perf_counter()
    future = backend.compile(json.dumps({"json": spec}))
    future.exception(60)
    took = time.perf_counter() - started
    done.set()
    watching.join()
    assert took > 0.05
    assert sorted(gaps)[-4] < max(took / 2, 0.1)
