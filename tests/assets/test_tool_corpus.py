"""What the bundled model is to learn of tools: template, requests and their measurements."""

import itertools
import json
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from minisgl.server.answer import AnswerForm, AnswerParser
from minisgl.server.chat_template import ChatTemplate
from minisgl.server.tool_formats import TOOL_FORMATS, TOOL_NAME
from tools.train_tiny import (
    batches,
    corpus,
    evaluate_tools,
    mixes,
    records,
    skills,
    tokenizer,
    tool_chats,
)
from tools.train_tiny.generate import GREEDY

TINY = Path(__file__).parents[2] / "minisgl/assets/tiny"
TEMPLATE = ChatTemplate(tokenizer.CHAT_TEMPLATE)
ODD_TOOL = {
    "name": "odd",
    "description": "Does <it> & 'that'.",
    "parameters": {
        "properties": {
            "items": {"type": "array", "items": {"type": "string"}, "description": "many"},
            "kind": {"enum": ["ä", 1, None], "description": "which"},
            "maybe": {"type": ["string", "null"]},
            "any": True,
        }
    },
}
CALLED = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "function": {"name": "odd", "arguments": {"kind": "<ä>"}}},
            {"type": "function", "function": {"name": "clock", "arguments": '{"a": 1}'}},
        ],
    },
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "It is 42."},
]
anything = given(st.integers(0, 2**32).map(random.Random))


def called(calls) -> list[dict]:
    """Calls as messages hold them."""
    return [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in calls]


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_tools_and_calls_are_rendered_as_transformers_does(system: list[dict]) -> None:
    import transformers  # seconds to import: only where needed

    theirs = transformers.AutoTokenizer.from_pretrained(TINY)
    tools = [{"type": "function", "function": f} for f in (ODD_TOOL, {"name": "clock"})]
    for chat, shown in itertools.product((system + CALLED, system + CALLED[:1]), (tools, None)):
        expected = theirs.apply_chat_template(
            chat,
            tools=shown,
            chat_template=tokenizer.CHAT_TEMPLATE,
            tokenize=False,
            add_generation_prompt=True,
        )
        assert TEMPLATE.render(chat, tools=shown) == expected
        assert ('"kind": "ä" | 1 | null (which)' in expected) == (shown is not None)
        assert ("Be brief." in expected) == bool(system)


def test_without_tools_nothing_is_rendered_anew() -> None:
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    bundled = ChatTemplate(config["chat_template"])
    chat = [{"role": role, "content": f"a {role} \n"} for role in ("system", "user", "assistant")]
    for messages in (chat, chat[1:], chat[::-1]):
        assert TEMPLATE.render(messages) == bundled.render(messages)


@settings(max_examples=100, deadline=None)
@anything
def test_tools_and_calls_are_learnt_as_they_are_rendered(rng: random.Random) -> None:
    skill, other = skills.skill(rng), skills.skill(rng, new=True)
    request = skills.double_request(skill, other, rng)
    tools = [skill.tool, other.tool]
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": request.text},
        {"role": "assistant", "content": "", "tool_calls": called(request.calls)},
        {"role": "tool", "content": "1"},
    ]
    learnt = [
        corpus.Message("system", "Be brief."),
        corpus.Message("user", request.text),
        corpus.Message("assistant", skills.written(request.calls)),
        corpus.Message("tool", "1"),
    ]
    learnt = tool_chats.with_tools(learnt, tool_chats.shown([skill, other], set()))
    rendered = TEMPLATE.render(chat, tools=tools, add_generation_prompt=False)
    assert rendered == corpus.chat("any", learnt).text + "\n"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_tools_are_learnt_behind_the_last_request(seed: int) -> None:
    """As they are rendered, of which only the last answers may know."""
    found = tool_chats.toolset(random.Random(seed))
    sample = tool_chats.tool_chat(random.Random(seed))
    turns = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", sample.text, re.DOTALL)
    assert [role for role, _ in turns].count("tools") == 1
    messages = [{"role": role, "content": text} for role, text in turns if role != "tools"]
    tools = [skill.tool for skill in found]
    rendered = TEMPLATE.render(messages, tools=tools, add_generation_prompt=False)
    assert rendered == sample.text + "\n"
    before, _, after = sample.text.partition("<|im_start|>tools\n")
    assert "<|im_start|>user" not in after
    calls = {name for name, _ in evaluate_tools.read_calls(turns[-1][1]) or []}
    assert calls <= {skill.name for skill, fits in zip(found, fitting(sample), strict=True) if fits}
    earlier = before.rpartition("<|im_start|>user\n")[0]
    weights = [weight for text, weight in sample.spans if text.startswith("<tool_call>")]
    assert weights == [0.0] * len(re.findall(r"assistant\n<tool_call>", earlier))


def fitting(sample: corpus.Sample) -> list[bool]:
    """Of each tool, whether it does what is asked."""
    return [mark.fits for _, mark in sample.marks if None not in (mark.topic, mark.fits)]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_a_choice_is_known_where_a_tool_s_first_line_ends(seed: int) -> None:
    found = tool_chats.toolset(random.Random(seed), most=4, parameters=1)
    sample = tool_chats.choice_chat(random.Random(seed))
    *lines, (end, last) = [(span, mark) for span, mark in sample.marks if mark.fits is not None]
    assert sample.spans[end][0] == corpus.END
    assert last == corpus.Mark(None, any(mark.fits for _, mark in lines))
    assert len(lines) == len(found)
    for skill, (span, mark) in zip(found, lines, strict=True):
        assert sample.spans[span][0] == skills.shown(skill.tool)[0]
        assert mark.topic == skills.topic(skill.like)
    asked = [(sample.spans[span][0], mark) for span, mark in sample.marks if mark.fits is None]
    assert len(asked) <= 1  # a request of two tools is about neither alone
    fit = {mark.topic for _, mark in lines if mark.fits}
    assert asked or any(fitting(sample))
    for text, mark in asked:
        assert text.startswith("<|im_start|>user\n")
        assert fit <= {mark.topic}
        is_refused = "I do not know" in sample.text.rpartition("assistant\n")[2]
        assert fit or (mark.topic == skills.NO_TOOL) or is_refused
    is_called = "<tool_call>" in sample.text
    assert any(fitting(sample)) == is_called
    if is_called:
        called = [skill for skill, fits in zip(found, fitting(sample), strict=True) if fits]
        assert any(sample.text.endswith(f'{{"name": "{skill.name}"') for skill in called)
    heavy = [text for text, weight in sample.spans if weight == tool_chats.FIRST]
    assert len(heavy) == 1
    assert (heavy == ["<"]) == is_called


def test_tools_are_the_same_tokens_in_pieces_and_what_fits_ends_a_line() -> None:
    tok = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    asked: set[int] = set()
    for seed in range(50):
        for chat in (tool_chats.tool_chat, tool_chats.choice_chat):
            sample = chat(random.Random(seed))
            encoded = batches.encode(sample, tok, context=2048)
            assert encoded.ids == tok.encode(sample.text).ids
            assert [*encoded.marks.values()] == [mark for _, mark in sample.marks]
            ends = {encoded.ids[at] for at, mark in encoded.marks.items() if mark.fits is not None}
            assert ends == {tok.token_to_id("Ċ"), tok.token_to_id(corpus.END)}
            asked |= {encoded.ids[at] for at, mark in encoded.marks.items() if mark.fits is None}
            assert {*batches.encode(sample, tok, context=40).marks} <= {*range(40)}
    assert asked == {tok.token_to_id(corpus.END)}


def test_without_a_request_tools_come_first() -> None:
    tools = [{"type": "function", "function": {"name": "setAlarm-now", "description": "Rings."}}]
    chat = [{"role": "assistant", "content": "Hello."}]
    shown = (
        '<|im_start|>tools\n- set alarm now: rings.\n{"name": "setAlarm-now", "arguments": {}}\n'
    )
    said = "<|im_start|>assistant\nHello.<|im_end|>\n"
    rendered = TEMPLATE.render(chat, tools=tools, add_generation_prompt=False)
    assert rendered == f"{shown}<|im_end|>\n{said}"


@settings(max_examples=200, deadline=None)
@anything
def test_calls_that_are_due_are_valid_and_the_server_reads_them(rng: random.Random) -> None:
    for new in (False, True):
        found = tool_chats.toolset(rng, new)
        names = [skill.name for skill in found]
        assert len({*names}) == len(names)
        assert all(TOOL_NAME.fullmatch(name) for name in names)
        request = tool_chats.needing_request(found, rng, new)
        text = skills.written(request.calls)
        assert evaluate_tools.read_calls(text) == list(request.calls)
        assert evaluate_tools.is_valid(list(request.calls), found)
        schemas = {skill.name: skill.tool["function"]["parameters"] for skill in found}
        parser = AnswerParser(AnswerForm(None, TOOL_FORMATS["hermes"], schemas))
        news = [*parser.push(text), *parser.end()]
        assert parser.has_calls
        assert parser.num_calls == len(request.calls)
        assert not [n for n in news if n.kind == "text"]


@settings(max_examples=100, deadline=None)
@anything
def test_every_string_of_a_call_stands_in_its_request(rng: random.Random) -> None:
    request = skills.request(skills.skill(rng), rng)
    for value in request.calls[0][1].values():
        if not isinstance(value, bool):
            assert str(value) in request.text


def test_nothing_that_is_held_out_is_trained() -> None:
    texts = skills.TOOLS
    for name in [name for name in texts if name.startswith("held_out_")]:
        trained, kept = texts[name.removeprefix("held_out_")], texts[name]
        assert all(text not in trained for text in kept), name
    asks = [ask for family in texts["family"] for ask in family["asks"]]
    begun = [ask for ask in asks if ask.split()[0] in texts["imperatives"]]
    asks += [way + ask[0].lower() + ask[1:] for way in texts["polite"] for ask in begun]
    trained = {re.sub(r"\{\w+\}", "{}", ask) for ask in asks}
    for family in texts["family"]:
        assert not {re.sub(r"\{\w+\}", "{}", ask) for ask in family["held_out_asks"]} & trained
    trained_names = {name for family in texts["family"] for name in family["names"]}
    assert not trained_names & {n for family in texts["held_out_family"] for n in family["names"]}


@settings(max_examples=100, deadline=None)
@anything
def test_a_record_answers_by_its_schema(rng: random.Random) -> None:
    for told in (True, False):
        record = records.record(rng, told=told)
        assert json.loads(record.answer) == record.values
        assert evaluate_tools.object_fits(record.values, record.properties, list(record.properties))
        assert "".join(text for text, _ in record.given_keys()) == record.answer
        if told:
            assert all(key in record.request for key in record.values)


def test_of_a_record_without_a_schema_the_values_are_learnt_and_the_tokens_are_the_same() -> None:
    tok = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    for seed in range(50):
        sample = corpus.keyed_record(random.Random(seed))
        encoded = batches.encode(sample, tok, context=2048)
        assert encoded.ids == tok.encode(sample.text).ids
        pairs = zip(encoded.ids, encoded.weights, strict=True)
        learnt = tok.decode([i for i, weight in pairs if weight == 1.0])
        assert '":' not in learnt
        assert learnt.rstrip().endswith("}")


def test_what_tools_answer_is_not_learnt() -> None:
    sample = corpus.chat("any", [corpus.Message("assistant", "a"), corpus.Message("tool", "b")])
    assert dict(sample.spans)[f"{corpus.START}tool\nb{corpus.END}"] == 0.0


def test_the_last_mix_has_tools_and_steps_of_it_are_seeded() -> None:
    tok = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    assert "tools" not in mixes.mix_at(mixes.TOOLS_FROM - 1)
    rng = random.Random(0)
    for after in (400, 2700, 3200):
        mix = mixes.mix_at(mixes.TOOLS_FROM + after)
        kinds = {mixes.sample(rng, mix).kind for _ in range(500)}
        assert {"tools", "choice", "lines", "record", "keyed record", "fact", "extraction"} <= kinds
    kinds = [mixes.sample(rng, mixes.mix_at(mixes.TOOLS_FROM)).kind for _ in range(300)]
    assert kinds.count("lines") > 240
    first, again = (
        batches.step_batches(0, mixes.TOOLS_FROM + 1, 2048, tok, 2048, long=False) for _ in "ab"
    )
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(first, again, strict=True))


def test_what_is_asked_of_tools_that_are_shown_and_of_none() -> None:
    for found, request in evaluate_tools.known_requests(random.Random(0), 50):
        ((name, _),) = request.calls
        assert [skill.name for skill in found].count(name) == 1
    kinds = evaluate_tools.needless_requests(20)
    assert {len(asked) for asked in kinds.values()} == {20}
    for found, text in [each for asked in kinds.values() for each in asked]:
        assert found
        words = {skill.like[0] for skill in found}
        assert "translate" not in words or not text.startswith("Translate")
    plain = [text for found, text in kinds["sums"] if ("add",) in {skill.like for skill in found}]
    assert plain == []


class Scripted:
    """Answers what it is told, in turn."""

    def __init__(self, answers: list[str]) -> None:
        self.answers = answers

    def replies(self, chats, sampling, limit=96) -> list[str]:
        assert all(chat.endswith(f"{corpus.START}assistant\n") for chat in chats)
        return self.answers


def test_calls_are_counted_as_valid_and_right() -> None:
    rng = random.Random(3)
    found = [skills.family_skill(rng, family=family) for family in skills.FAMILIES[False][:3]]
    asked = [(found, skills.request(skill, rng)) for skill in found]
    exact = [skills.written(request.calls) for _, request in asked]

    def measured(*answers: str) -> tuple[float, float]:
        result = evaluate_tools.due_calls(Scripted([*answers]), asked, GREEDY, verbose=False)
        return result["valid"], result["right"]

    (name, arguments), *_ = asked[0][1].calls
    key = next(iter(arguments))
    third = pytest.approx(1 / 3)
    two_thirds = pytest.approx(2 / 3)
    assert measured(*exact) == (1, 1)
    other = skills.written(((name, {**arguments, key: "Nowhere"}),))
    assert measured(other, *exact[1:]) == (1, two_thirds)
    for wrong in (
        "It rains.",
        skills.written((("no_such_tool", arguments),)),
        skills.written(((name, {**arguments, "no_such_key": 1}),)),
        skills.written(((name, {**arguments, key: 1}),)),
        skills.written(((name, {}),)),
        exact[0].removesuffix("\n</tool_call>"),
    ):
        assert measured(wrong, wrong, exact[2]) == (third, third)


def test_answers_by_schema_are_counted(monkeypatch) -> None:
    monkeypatch.setattr(evaluate_tools, "COUNT", 3)
    rng = random.Random("by schema")
    asked = [records.record(rng, new=True) for _ in range(3)]
    exact = [record.answer for record in asked]
    result = evaluate_tools.by_schema(Scripted(exact), GREEDY, verbose=False)
    assert set(result.values()) == {1}
    broken = evaluate_tools.by_schema(Scripted(["{", '{"no": 1}', exact[2]]), GREEDY, verbose=False)
    assert (broken["parsed"], broken["by the schema"]) == (2 / 3, 1 / 3)
    assert broken["right"] == 1 / 3
