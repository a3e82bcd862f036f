"""Chats with tools: requests that need a call, requests that need none, and what tools answer."""

import json
import random
from collections.abc import Callable
from typing import Any

from tools.train_tiny import corpus, knowledge, skills
from tools.train_tiny.corpus import Message, Sample
from tools.train_tiny.skills import Request, Skill, a_word

# What is asked where tools are there and none is needed.
PLAIN = {"fact": 6, "addition": 2, "extraction": 1, "echo": 1, "unknown": 3, "story": 0.4}


def _near(skill: Skill, rng: random.Random, new: bool) -> Skill:
    """A tool that has the verb or the noun of another."""
    if len(skill.like) == 1:
        return skills.skill(rng, new)
    verb, noun = skill.like
    if rng.random() < 0.5:
        return skills.made_skill(rng, new, verb=verb)
    return skills.made_skill(rng, new, noun=noun)


def toolset(rng: random.Random, new: bool = False, most: int = 5) -> list[Skill]:
    """Tools of different names that do different things."""
    count = rng.choices((1, 2, 3, 4, 5), (5, 5, 4, 2, 1))[0]
    found = [skills.skill(rng, new)]
    while len(found) < min(count, most):
        near = rng.random() < 0.4
        other = _near(rng.choice(found), rng, new) if near else skills.skill(rng, new)
        if all(other.like != each.like and other.name != each.name for each in found):
            found.append(other)
    rng.shuffle(found)
    return found


def missing_request(found: list[Skill], rng: random.Random, new: bool = False) -> str:
    """What none of the tools does."""
    while True:
        near = rng.random() < 0.3
        other = _near(rng.choice(found), rng, new) if near else skills.skill(rng, new)
        if all(other.like != each.like for each in found):
            return skills.request(other, rng, new).text


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
    """With an opening, a closing or a sentence that changes nothing."""
    patterns = knowledge.PATTERNS
    if rng.random() < 0.3:
        opening = rng.choice(patterns["openings"])
        text = opening + text
    if rng.random() < 0.1:
        text = f"{rng.choice(patterns['fillers'])} {text}"
    if rng.random() < 0.1 and text[-1] in ".?!":
        text = f"{text} {rng.choice((*patterns['fillers'], 'Thanks!', 'Thank you.'))}"
    return text


def _call_turn(found: list[Skill], rng: random.Random, go_on: bool) -> list[Message]:
    asked = needing_request(found, rng)
    turn = [
        Message("user", _polite(asked.text, rng)),
        Message("assistant", skills.written(asked.calls)),
    ]
    if not go_on and rng.random() < 0.5:
        return turn
    answers = [answered(rng) for _ in asked.calls]
    turn += [Message("tool", text) for text, _ in answers]
    return [*turn, Message("assistant", " ".join(sentence for _, sentence in answers))]


def _plain_turn(
    found: list[Skill],
    rng: random.Random,
    turns: dict[str, Callable[[random.Random], tuple[str, str]]],
) -> list[Message]:
    if rng.random() < 0.35:
        text, answer = _polite(missing_request(found, rng), rng), corpus.PATTERNS["fallback"]
    else:
        kind = rng.choices(list(PLAIN), list(PLAIN.values()))[0]
        if kind == "addition" and any(each.like == ("add",) for each in found):
            kind = "fact"
        text, answer = turns[kind](rng)
    return [Message("user", text), Message("assistant", answer)]


def system(found: list[Skill], rng: random.Random) -> Message:
    """The message that shows the tools, behind a system prompt or alone."""
    text = skills.shown([skill.tool for skill in found])
    if rng.random() < 0.2:
        text = f"{rng.choice(corpus.PATTERNS['systems'])}\n\n{text}"
    return Message("system", text)


def tool_chat(rng: random.Random, turns: int | None = None) -> Sample:
    """A chat with tools, of one turn or of some."""
    found = toolset(rng)
    count = turns or rng.choices((1, 2, 3), (5, 3, 2))[0]
    messages = [system(found, rng)]
    for i in range(count):
        if rng.random() < 0.6:
            messages += _call_turn(found, rng, go_on=i + 1 < count)
        else:
            messages += _plain_turn(found, rng, corpus.TURNS)
    return corpus.chat("tools", messages)
