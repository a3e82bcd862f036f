"""Chats with tools: requests that need a call, requests that need none, and what tools answer."""

import json
import random
import re
from dataclasses import replace
from typing import Any

from tools.train_tiny import corpus, knowledge, skills
from tools.train_tiny.corpus import Mark, Message, Sample
from tools.train_tiny.skills import Request, Skill, a_word

# What is asked where tools are there and none is needed.
PLAIN = {"fact": 6, "addition": 2, "extraction": 1, "echo": 1, "unknown": 3, "story": 0.4}


FIRST = 5.0  # the weight of an answer's first token, which decides whether it is a call


def _near(skill: Skill, rng: random.Random, new: bool, parameters: int) -> Skill:
    """A tool that has the verb or the noun of another."""
    if len(skill.like) == 1:
        return skills.skill(rng, new, parameters)
    verb, noun = skill.like
    if rng.random() < 0.5:
        return skills.made_skill(rng, new, verb=verb, most=parameters)
    return skills.made_skill(rng, new, noun=noun, most=parameters)


def toolset(
    rng: random.Random, new: bool = False, most: int = 5, parameters: int = 4
) -> list[Skill]:
    """Tools of different names that do different things."""
    count = rng.choices((1, 2, 3, 4, 5), (5, 5, 4, 2, 1))[0]
    found = [skills.skill(rng, new, parameters)]
    while len(found) < min(count, most):
        near = rng.random() < 0.4
        other = (
            _near(rng.choice(found), rng, new, parameters)
            if near
            else skills.skill(rng, new, parameters)
        )
        if all(other.like != each.like and other.name != each.name for each in found):
            found.append(other)
    rng.shuffle(found)
    return found


def missing_request(found: list[Skill], rng: random.Random, new: bool = False) -> Request:
    """What none of the tools does."""
    while True:
        near = rng.random() < 0.3
        other = _near(rng.choice(found), rng, new, 4) if near else skills.skill(rng, new)
        if all(other.like != each.like for each in found):
            return skills.request(other, rng, new)


def needing_request(found: list[Skill], rng: random.Random, new: bool = False) -> Request:
    """What needs a call of one of the tools, or two calls."""
    skill = rng.choice(found)
    if rng.random() < 0.1:
        return skills.double_request(skill, rng.choice(found), rng, new)
    return skills.request(skill, rng, new)


def answered(rng: random.Random, new: bool = False) -> tuple[str, str]:
    """What a tool answers, and the sentence that says it."""

    def word() -> str:
        return str(a_word("words", rng, new))

    kind = rng.random()
    if kind < 0.15:
        number = str(skills.value("number", rng, new))
        return number, f"The answer is {number}."
    if kind < 0.4:
        text = a_word("sentences", rng, False).format(
            w=word(),
            w2=word(),
            w3=word(),
            n=skills.value("integer", rng, new),
            city=skills.value("city", rng, new),
            name=skills.value("name", rng, new),
            noun=a_word("nouns", rng, new),
            key=skills.in_words(a_word("keys", rng, new)),
        )
        return text, text
    said: dict[str, Any] = {}
    for _ in range(rng.choice((1, 1, 2, 2, 3))):
        kinds = ("word", "integer", "number", "name", "city", "time", "date")
        drawn = rng.choice((*kinds, "said", "said", "said"))
        key = a_word("results" if rng.random() < 0.8 else "keys", rng, new)
        said[key] = word() if drawn == "said" else skills.value(drawn, rng, new)
    parts = [f"the {skills.in_words(key)} is {value}" for key, value in said.items()]
    joined = ", ".join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
    return json.dumps(said, ensure_ascii=False), joined[0].upper() + joined[1:] + "."


def _polite(text: str, rng: random.Random) -> str:
    """With a polite beginning, an opening, a closing or a sentence that changes nothing."""
    patterns = knowledge.PATTERNS
    if text.split()[0] in skills.TOOLS["imperatives"] and rng.random() < 0.3:
        text = rng.choice(skills.TOOLS["polite"]) + text[0].lower() + text[1:]
    if rng.random() < 0.3:
        opening = rng.choice(patterns["openings"])
        text = opening + text
    if rng.random() < 0.1:
        text = f"{rng.choice(patterns['fillers'])} {text}"
    if rng.random() < 0.1 and text[-1] in ".?!":
        text = f"{text} {rng.choice((*patterns['fillers'], 'Thanks!', 'Thank you.'))}"
    return text


def decided(text: str) -> Message:
    """An answer whose first token counts more."""
    first = re.match(r"\d|[A-Za-z]+|[^\sA-Za-z0-9]+", text)
    at = first.end() if first else 0
    return Message("assistant", text, ((text[:at], FIRST), (text[at:], 1.0)) if at else ())


def shown(found: list[Skill], needed: set[str]) -> Message:
    """The message that shows the tools, and which of them are needed."""
    spans = [(line, 0.0) for skill in found for line in skills.shown(skill.tool)]
    marks = [
        (2 * i, Mark(skills.topic(skill.like), skill.name in needed))
        for i, skill in enumerate(found)
    ]
    marks.append((len(spans), Mark(None, any(mark.fits for _, mark in marks))))
    return Message("tools", "".join(line for line, _ in spans), tuple(spans), tuple(marks))


def with_tools(messages: list[Message], tools: Message) -> list[Message]:
    """A chat as the template shows it: its tools behind the last request."""
    at = max(i for i, message in enumerate(messages) if message.role == "user")
    return [*messages[: at + 1], tools, *messages[at + 1 :]]


def _asked(request: Request, rng: random.Random) -> Message:
    marks = () if request.topic is None else ((0, Mark(request.topic)),)
    return Message("user", _polite(request.text, rng), marks=marks)


def _call_turn(asked: Request, rng: random.Random, go_on: bool) -> list[Message]:
    turn = [_asked(asked, rng), decided(skills.written(asked.calls))]
    if not go_on and rng.random() < 0.6:
        return turn
    answers = [answered(rng) for _ in asked.calls]
    turn += [Message("tool", text) for text, _ in answers]
    return [*turn, Message("assistant", " ".join(sentence for _, sentence in answers))]


def _refused_turn(found: list[Skill], rng: random.Random) -> list[Message]:
    asked = _asked(missing_request(found, rng), rng)
    return [asked, decided(corpus.PATTERNS["fallback"])]


def is_plain(text: str, found: list[Skill]) -> bool:
    """Whether none of the tools would do what this message asks, which the model does itself."""
    likes = {each.like for each in found}
    return not (
        (("add",) in likes and re.search(r"\d", text))
        or (("translate",) in likes and "ranslate" in text)
    )


def _plain_turn(found: list[Skill], rng: random.Random) -> list[Message]:
    kind = rng.choices(list(PLAIN), list(PLAIN.values()))[0]
    text, answer = corpus.TURNS[kind](rng)
    if not is_plain(text, found):
        text, answer = corpus.TURNS["fact"](rng)
    return [Message("user", text, marks=((0, Mark(skills.NO_TOOL)),)), decided(answer)]


def _turn(found: list[Skill], rng: random.Random, go_on: bool) -> tuple[list[Message], set[str]]:
    """One request with its answers, and the names of the tools that it needs."""
    drawn = rng.random()
    if drawn < 0.5:
        asked = needing_request(found, rng)
        return _call_turn(asked, rng, go_on), {name for name, _ in asked.calls}
    return (_refused_turn if drawn < 0.75 else _plain_turn)(found, rng), set()


def _system(rng: random.Random) -> list[Message]:
    return [Message("system", rng.choice(corpus.PATTERNS["systems"]))] if rng.random() < 0.2 else []


def tool_chat(rng: random.Random) -> Sample:
    """A chat with tools, of one turn or of some. Earlier turns do not see them, so their calls
    are not learnt."""
    found = toolset(rng)
    messages = _system(rng)
    for _ in range(rng.choices((0, 1, 2), (8, 2, 1))[0]):
        turn, _ = _turn(found, rng, go_on=True)
        messages += [replace(m, spans=((m.content, 0.0),), marks=()) for m in turn]
    turn, needed = _turn(found, rng, go_on=False)
    return corpus.chat("tools", with_tools(messages + turn, shown(found, needed)))


def choice_chat(rng: random.Random) -> Sample:
    """A short chat that ends where it is known which tool is called, or that none is."""
    found = toolset(rng, most=4, parameters=1)
    turn, needed = _turn(found, rng, go_on=False)
    user, answer = turn[:2]
    begun = re.match(r'<tool_call>\n\{"name": "[^"]+"|I do not know', answer.content)
    answer = decided(begun[0]) if begun else answer
    messages = with_tools([*_system(rng), user, answer], shown(found, needed))
    made = corpus.chat("choice", messages)
    return replace(made, spans=made.spans[:-1]) if begun else made


def lines_sample(rng: random.Random) -> Sample:
    """A request and the first lines of some tools: what is compared, and nothing else."""
    found = toolset(rng, most=4, parameters=1)
    turn, needed = _turn(found, rng, go_on=False)
    tools = shown(found, needed)
    lines, marks = tools.spans[::2], tuple((i // 2, mark) for i, mark in tools.marks)
    shorter = Message("tools", "".join(line for line, _ in lines), lines, marks)
    return corpus.chat("lines", [turn[0], shorter])
