"""Questions on LLM serving and on this engine: the facts of `knowledge.toml` times many phrasings.

A phrasing is a sentence pattern with a slot. The patterns named held_out_* are used by the
evaluation only, so its score measures new sentences, not new slot values.
"""

import random
from dataclasses import dataclass

from tools.train_tiny import words

FACTS = words.FACTS
PATTERNS: dict[str, list[str]] = words.WORDS["question"]


@dataclass(frozen=True)
class Question:
    """One question with its answer and the key that a right answer contains (any case)."""

    text: str
    answer: str
    key: str
    kind: str


def third_person(phrase: str) -> str:
    """'set the port' -> 'sets the port'."""
    verb, rest = phrase.split(" ", 1)
    return f"{verb}{'es' if verb.endswith(('ch', 'sh', 's')) else 's'} {rest}"


def _flag_for(pattern: str, goal: str) -> str:
    return pattern.replace("{does}", third_person(goal)).replace("{do}", goal)


def _capitalised(text: str) -> str:
    return text[0].upper() + text[1:]


def questions(held_out: bool) -> list[list[Question]]:
    """All questions, one list per fact: with the training patterns or with the held-out ones."""
    prefix = "held_out_" if held_out else ""
    define, why, flag_for, flag_what = (
        PATTERNS[prefix + name] for name in ("define", "why", "flag_for", "flag_what")
    )
    facts = []
    for c in FACTS["concept"]:
        forms = [_capitalised(p.replace("{x}", x)) for x in c["names"] for p in define]
        facts.append([Question(t, c["answer"], c["key"], "define") for t in forms])
        if "why" in c:
            forms = [_capitalised(p.replace("{x}", x)) for x in c["names"] for p in why]
            facts.append([Question(t, c["why"], c["why_key"], "why") for t in forms])
    for f in FACTS["flag"]:
        forms = [_flag_for(p, goal) for goal in f["goals"] for p in flag_for]
        facts.append([Question(t, f["answer"], f["flag"], "flag-for") for t in forms])
        forms = [p.replace("{x}", f["flag"]) for p in flag_what]
        facts.append([Question(t, f["answer"], f["key"], "flag-what") for t in forms])
    for t in FACTS["topic"]:
        texts = t["questions"][-2:] if held_out else t["questions"][:-2]
        facts.append([Question(text, t["answer"], t["key"], "topic") for text in texts])
    return facts


TRAIN_QUESTIONS = questions(held_out=False)


def varied(text: str, rng: random.Random) -> str:
    """The same question with other openings, closings, capitals and punctuation."""
    opening = rng.choice(PATTERNS["openings" if rng.random() < 0.9 else "asides"])
    text = opening.format(who=rng.choice(PATTERNS["people"])) + text
    if rng.random() < 0.15:
        text = text.rstrip("?.!")
    elif text[-1] not in "?.!":
        text += rng.choice(("", ".", "!"))
    else:
        text += rng.choice(PATTERNS["closings"])
    if rng.random() < 0.12:
        text = f"{rng.choice(PATTERNS['fillers'])} {text}"
    if rng.random() < 0.12:
        text = f"{text} {rng.choice(PATTERNS['fillers'])}"
    return text.lower() if rng.random() < 0.15 else text


def question(rng: random.Random) -> Question:
    """A training question: every fact is equally likely."""
    fact = rng.choice(TRAIN_QUESTIONS)
    q = rng.choice(fact)
    return Question(varied(q.text, rng), q.answer, q.key, q.kind)


def held_out_questions(count: int, seed: int) -> list[Question]:
    """`count` questions in held-out patterns, spread over all facts, seeded."""
    rng = random.Random(f"held-out-{seed}")
    facts = questions(held_out=True)
    rng.shuffle(facts)
    return [rng.choice(facts[i % len(facts)]) for i in range(count)]


def handbook(rng: random.Random, entries: int) -> str:
    """Plain text: some answers in a row, one per line."""
    answers = [c["answer"] for c in FACTS["concept"]] + [f["answer"] for f in FACTS["flag"]]
    return "\n".join(rng.sample(answers, entries))
