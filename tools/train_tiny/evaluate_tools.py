"""Measurements of tool calls and of answers by schema, for `evaluate`.

Tools, names, parameters, phrasings and most values of rows called new are of the held-out lists.
Elsewhere tools are of trained kinds, with values and wordings of requests of the held-out lists;
many of these are close to trained ones. Sums and what is not known are worded as in training. A
call is valid where it is written in the form, is of one of the tools and fits its schema, with no
argument that the schema does not name; it is right where the name and all arguments are those that
were asked for.
"""

import json
import random
import re
from typing import Any, Protocol

from tools.train_tiny import corpus, knowledge, records, skills, tasks, tool_chats
from tools.train_tiny.generate import Sampling
from tools.train_tiny.skills import Request, Schema, Skill

COUNT = 60  # prompts of each measurement
Call = tuple[str, dict[str, Any]]


class Asked(Protocol):
    """Who answers conversations, which are texts up to the assistant's turn."""

    def replies(self, chats: list[str], sampling: Sampling, limit: int = 96) -> list[str]:
        raise NotImplementedError


def conversation(found: list[Skill], *messages: corpus.Message) -> str:
    """A chat with tools up to the assistant's next turn."""
    asked = [*messages, corpus.Message("assistant", "")]
    shown = tool_chats.with_tools(asked, tool_chats.shown(found, set()))
    return corpus.chat("tools", shown).text.removesuffix(corpus.END)


def share(hits: list[bool]) -> float:
    return sum(hits) / max(1, len(hits))


def fits(value: object, schema: Schema) -> bool:
    """Whether a value is of a schema's type and one of its enum, if it has one."""
    types: dict[str, type | tuple[type, ...]] = {
        "string": str,
        "integer": int,
        "number": (int, float),
        "boolean": bool,
    }
    known = isinstance(value, types[schema["type"]])
    known = known and isinstance(value, bool) == (schema["type"] == "boolean")
    return known and value in schema.get("enum", [value])


def object_fits(value: object, properties: dict[str, Schema], required: list[str]) -> bool:
    """Whether a value is an object of these properties and no others."""
    return (
        isinstance(value, dict)
        and set(required) <= value.keys() <= properties.keys()
        and all(fits(each, properties[key]) for key, each in value.items())
    )


def read_calls(text: str) -> list[Call] | None:
    """The calls of an answer that is nothing but calls, or None."""
    found = []
    for part in re.split(r"(?<=</tool_call>)\n", text):
        match = re.fullmatch(r"<tool_call>\n(.*)\n</tool_call>", part)
        try:
            call = json.loads(match[1]) if match else None
        except json.JSONDecodeError:
            return None
        if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
            return None
        found.append((call["name"], call["arguments"]))
    return found


def is_valid(calls: list[Call] | None, found: list[Skill]) -> bool:
    schemas = {skill.name: skill.tool["function"]["parameters"] for skill in found}
    return calls is not None and all(
        name in schemas
        and object_fits(arguments, schemas[name]["properties"], schemas[name]["required"])
        for name, arguments in calls
    )


def new_tool_calls(bench: Asked, sampling: Sampling, verbose: bool) -> dict[str, float]:
    """One call or two, of tools that training never saw."""
    rng = random.Random("new tools")
    asked = []
    for _ in range(COUNT):
        found = tool_chats.toolset(rng, new=True, most=4)
        asked.append((found, tool_chats.needing_request(found, rng, new=True)))
    return due_calls(bench, asked, sampling, verbose)


def known_tools(rng: random.Random, count: int) -> list[Skill]:
    """Tools of different trained kinds, whose requests are of the held-out lists."""
    found: list[Skill] = []
    while len(found) < count:
        other = skills.family_skill(rng, True, rng.choice(skills.FAMILIES[False]))
        if all(other.like != each.like and other.name != each.name for each in found):
            found.append(other)
    return found


def known_requests(rng: random.Random, count: int) -> list[tuple[list[Skill], Request]]:
    """Requests of one call of a trained kind of tool, which stands beside others."""
    asked = []
    for _ in range(count):
        found = known_tools(rng, rng.randint(1, 4))
        asked.append((found, skills.request(rng.choice(found), rng, new=True)))
    return asked


def known_tool_calls(bench: Asked, sampling: Sampling, verbose: bool) -> dict[str, float]:
    """One call of a tool of a trained kind, asked for in other words."""
    asked = known_requests(random.Random("known tools"), COUNT)
    return due_calls(bench, asked, sampling, verbose)


def due_calls(
    bench: Asked, asked: list[tuple[list[Skill], Request]], sampling: Sampling, verbose: bool
) -> dict[str, float]:
    """The shares of answers that begin as a call, of valid and of right ones."""
    chats = [conversation(tools, corpus.Message("user", r.text)) for tools, r in asked]
    begun, valid, right = [], [], []
    for (found, request), text in zip(asked, bench.replies(chats, sampling, 160), strict=True):
        calls = read_calls(text)
        begun.append(text.startswith("<tool_call>"))
        valid.append(is_valid(calls, found))
        right.append(calls == list(request.calls))
        if verbose and not right[-1]:
            print(f"  wrong call {request.text!r} -> {text!r}, not {request.calls}")
    return {"begun": share(begun), "valid": share(valid), "right": share(right)}


def needless_requests(count: int) -> dict[str, list[tuple[list[Skill], str]]]:
    """Messages for which none of the tools is needed: questions and tasks that the model does
    itself, what it does not know, and what only a tool that is not there does, of a trained kind
    or of a new one."""
    rng = random.Random("needless calls")
    texts = {
        "facts": [question.text for question in knowledge.held_out_questions(count, seed=1)],
        "sums": [tasks.addition(rng)[0] for _ in range(count)],
        "JSON": [tasks.extraction(rng, True, True).request for _ in range(count)],
        "unknown": [corpus.unknown_turn(rng)[0] for _ in range(count)],
    }
    asked: dict[str, list[tuple[list[Skill], str]]] = {}
    for name, given in texts.items():
        asked[name] = []
        while len(asked[name]) < len(given):
            found = known_tools(rng, rng.randint(1, 4))
            if tool_chats.is_plain(text := given[len(asked[name])], found):
                asked[name].append((found, text))
    for name in ("no such tool", "no such new tool"):
        asked[name] = []
        for _ in range(count):
            if name == "no such tool":
                missing, *found = known_tools(rng, rng.randint(2, 5))
                request = skills.request(missing, rng, new=True)
            else:
                found = tool_chats.toolset(rng, new=True, most=4)
                request = tool_chats.missing_request(found, rng, new=True)
            asked[name].append((found, request.text))
    return asked


def needless_calls(bench: Asked, sampling: Sampling, verbose: bool) -> dict[str, float]:
    """Where none is due, the share of answers without a call, and of facts that are right."""
    result = {}
    for name, asked in needless_requests(COUNT).items():
        chats = [conversation(found, corpus.Message("user", text)) for found, text in asked]
        answers = bench.replies(chats, sampling)
        result[name] = share(["<tool_call>" not in answer for answer in answers])
        if name == "facts":
            pairs = zip(knowledge.held_out_questions(COUNT, seed=1), answers, strict=True)
            result["facts right"] = share([q.key.lower() in a.lower() for q, a in pairs])
        if verbose:
            for chat, answer in zip(chats, answers, strict=True):
                if "<tool_call>" in answer:
                    print(f"  needless call {chat!r} -> {answer!r}")
    return result


def said_answers(bench: Asked, sampling: Sampling, verbose: bool) -> dict[str, float]:
    """What a tool answered, said: the share of sentences that are right as a whole."""
    rng = random.Random("said answers")
    chats, expected = [], []
    for _ in range(COUNT):
        found = tool_chats.toolset(rng, new=True, most=4)
        request = skills.request(rng.choice(found), rng, new=True)
        answer, sentence = tool_chats.answered(rng, new=True)
        calls = corpus.Message("assistant", skills.written(request.calls))
        turn = corpus.Message("user", request.text), calls, corpus.Message("tool", answer)
        chats.append(conversation(found, *turn))
        expected.append(sentence)
    answers = bench.replies(chats, sampling)
    if verbose:
        for sentence, answer in zip(expected, answers, strict=True):
            if sentence != answer:
                print(f"  said {answer!r}, not {sentence!r}")
    return {"right": share([a == e for a, e in zip(answers, expected, strict=True)])}


def by_schema(bench: Asked, sampling: Sampling, verbose: bool) -> dict[str, float]:
    """Answers in JSON by keys or a schema that the request tells, with no grammar to help."""
    rng = random.Random("by schema")
    asked = [records.record(rng, new=True) for _ in range(COUNT)]
    form = f"{corpus.START}user\n{{}}{corpus.END}\n{corpus.START}assistant\n"
    chats = [form.format(record.request) for record in asked]
    parsed, valid, right, values = [], [], [], []
    for record, text in zip(asked, bench.replies(chats, sampling), strict=True):
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            found = None
        parsed.append(isinstance(found, dict))
        valid.append(object_fits(found, record.properties, list(record.properties)))
        right.append(found == record.values)
        given = found if isinstance(found, dict) else {}
        values += [given.get(key) == value for key, value in record.values.items()]
        if verbose and not right[-1]:
            print(f"  wrong JSON {record.request!r} -> {text!r}, not {record.answer!r}")
    names = ("parsed", "by the schema", "right", "right values")
    return dict(zip(names, map(share, (parsed, valid, right, values)), strict=True))
