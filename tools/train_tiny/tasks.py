"""Small tasks with one right answer: additions and extraction of fields as JSON."""

import json
import random
import re
from dataclasses import dataclass

from tools.train_tiny import words

WORDS: dict[str, list[str]] = words.WORDS["task"]

# Words that training sees, to take apart: those of every list that is not for the evaluation.
_PIECES = sorted(
    {
        word.lower()
        for lists in words.WORDS.values()
        for name, texts in lists.items()
        if not name.startswith("held_out")
        for word in re.findall(r"[A-Za-z]{3,}", " ".join(map(str, texts)))
    }
)

# One pair in ten never occurs in training, in this order or the other.
_HELD_OUT_SHARE = 10


def is_held_out_pair(a: int, b: int) -> bool:
    """Whether the unordered pair is kept for the evaluation (a fixed tenth of all pairs)."""
    low, high = sorted((a, b))
    return (low * 7919 + high * 104729) % 997 % _HELD_OUT_SHARE == 0


def worked_sum(a: int, b: int) -> str:
    """The addition by columns, as the model answers it: ones, carry, tens, sum.

    Columns in this order make every written digit a function of two or three digits in sight.
    """
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    terms = f"{a // 10} + {b // 10}" + (" + 1" if carry else "")
    return f"Ones: {a % 10} + {b % 10} = {ones}. Tens: {terms} = {tens}. So {a} + {b} = {a + b}."


def addition(rng: random.Random) -> tuple[str, str]:
    """A question on a training pair over 0-99 and its worked answer."""
    while True:
        a, b = rng.randrange(100), rng.randrange(100)
        if rng.random() < 0.15:
            a = rng.randrange(10)
        if rng.random() < 0.15:
            b = rng.randrange(10)
        if not is_held_out_pair(a, b):
            return rng.choice(WORDS["addition"]).format(a=a, b=b), worked_sum(a, b)


def made_up_name(rng: random.Random) -> str:
    """A word that is no real name, so that copying must be learnt, not names.

    Half are pronounceable; half are pieces of the corpus's own words, so that the tokens of any
    name have been copied.
    """
    if rng.random() < 0.5:
        pieces = [
            "".join(rng.choice(WORDS[part]) for part in ("onsets", "vowels", "codas"))
            for _ in range(rng.choice((1, 2, 2, 3)))
        ]
    else:
        pieces = [_piece(rng.choice(_PIECES), rng) for _ in range(rng.choice((1, 2, 2, 3)))]
    return "".join(pieces).capitalize()


def _piece(word: str, rng: random.Random) -> str:
    start = rng.randrange(len(word) - 1)
    return word[start : start + rng.randint(2, 4)]


def echo(rng: random.Random) -> tuple[str, str]:
    """Words to repeat: names, made-up names and numbers. Copying is half of extraction."""

    def word() -> str:
        kind = rng.choice(("made up", "made up", "given", "family", "cities", "number"))
        if kind == "number":
            return str(rng.randrange(1000))
        return made_up_name(rng) if kind == "made up" else rng.choice(WORDS[kind])

    text = " ".join(word() for _ in range(rng.randint(2, 7)))
    return rng.choice(WORDS["echo"]).format(x=text), text


@dataclass(frozen=True)
class Extraction:
    """A request, and the object whose compact JSON is the right answer."""

    request: str
    values: dict[str, str | int]

    @property
    def answer(self) -> str:
        return json.dumps(self.values, ensure_ascii=False)


def _listed(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + " and " + keys[-1]


def _person(rng: random.Random, new_names: bool) -> dict[str, str | int]:
    prefix = "held_out_" if new_names and rng.random() < 0.5 else ""

    def word(kind: str) -> str:
        made_up = not new_names and rng.random() < 0.5
        return made_up_name(rng) if made_up else rng.choice(WORDS[prefix + kind])

    name = word("given") if rng.random() < 0.4 else f"{word('given')} {word('family')}"
    person = {"name": name, "age": rng.randint(1, 99), "city": word("cities")}
    return {**person, "job": rng.choice(WORDS["jobs"])}


def extraction(
    rng: random.Random, new_names: bool = False, new_patterns: bool = False
) -> Extraction:
    """A request to extract fields. `new_names` combines names and cities anew, half of them words
    unknown to training; `new_patterns` uses sentences and wordings unknown to training."""
    prefix = "held_out_" if new_patterns else ""
    if rng.random() < 0.7:
        values = _person(rng, new_names)
        text = rng.choice(WORDS[prefix + "people"])
    else:
        price = rng.randint(2, 999)
        values = {
            "item": rng.choice(WORDS["items"]),
            "color": rng.choice(WORDS["colors"]),
            "price": price,
        }
        text = rng.choice(WORDS[prefix + "goods"])
    keys = [key for key in values if "{" + key + "}" in text]
    rng.shuffle(keys)
    if rng.random() < 0.4:
        keys = keys[: rng.randint(1, len(keys))]
    text = text.format(**values)
    if not (new_names or new_patterns) and rng.random() < 0.3:
        filler = rng.choice(words.WORDS["question"]["fillers"])
        text = rng.choice((f"{filler} {text}", f"{text} {filler}"))
    request = rng.choice(WORDS[prefix + "requests"]).format(fields=_listed(keys), text=text)
    return Extraction(request, {key: values[key] for key in keys})
