"""Texts of which a JSON object is wanted, by keys or by a schema: extraction of anything.

Where nothing in the request tells the schema, the server's grammar does: then the keys are given
to the model, and it learns the values only.
"""

import json
import random
from dataclasses import dataclass
from typing import Any

from tools.train_tiny import skills
from tools.train_tiny.skills import Parameter, Schema, a_word

Spans = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Record:
    """A request, the schema of its answer, and the right values in the order of the schema."""

    request: str
    properties: dict[str, Schema]
    values: dict[str, Any]

    @property
    def answer(self) -> str:
        return json.dumps(self.values, ensure_ascii=False)

    def given_keys(self) -> Spans:
        """The answer in pieces with the weight of their loss: 0 for keys, 1 for values."""
        spans: list[tuple[str, float]] = []
        for i, (key, value) in enumerate(self.values.items()):
            last = i == len(self.values) - 1
            spans.append((f"{' ' if i else '{'}{json.dumps(key)}:", 0.0))
            text = json.dumps(value, ensure_ascii=False)
            spans.append((f" {text}{'}' if last else ','}", 1.0))
        return tuple(spans)


def _said(rng: random.Random, new: bool) -> tuple[str, list[Parameter], dict[str, Any]]:
    """A text, the parameters it says, and their values: a record, or what a tool may be asked."""
    if rng.random() < 0.4:
        while True:
            skill = skills.skill(rng, new)
            asked = skills.request(skill, rng, new)
            values = asked.calls[0][1]
            if values:
                return asked.text, [p for p in skill.parameters if p.key in values], values
    parameters = skills.made_parameters(rng, new, rng.randint(1, 4))
    values, clauses = {}, []
    for p in parameters:
        values[p.key] = drawn = skills.value(p.kind, rng, new)
        if p.kind == "boolean":
            pattern = rng.choice(p.says[0] if drawn else p.says[1])
        else:
            pattern = a_word("says", rng, False)
        clauses.append(pattern.format(key=skills.in_words(p.key), x=drawn))
    rng.shuffle(clauses)
    joined = ", ".join(clauses[:-1]) + (" and " if len(clauses) > 1 else "") + clauses[-1]
    noun = a_word("nouns", rng, new)
    text = a_word("records", rng, new).format(say=joined, noun=noun, Noun=noun.capitalize())
    return text, parameters, values


def _listed(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + " and " + keys[-1]


def record(rng: random.Random, new: bool = False, told: bool = True) -> Record:
    """A request for JSON; with `told` it names the keys or holds a schema."""
    text, parameters, values = _said(rng, new)
    rng.shuffle(parameters)
    if rng.random() < 0.3:
        parameters = parameters[: rng.randint(1, len(parameters))]
    properties = {p.key: p.schema for p in parameters}
    if not told:
        request = text
    elif rng.random() < 0.4:
        keys = list(properties)
        quoted = rng.random() < 0.3
        fields = _listed([f'"{key}"' for key in keys] if quoted else keys)
        request = a_word("schema_asks", rng, new).format(fields=fields, text=text)
    else:
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        form = rng.random()
        written = skills.prototype(properties)
        if form < 0.5:
            written = json.dumps(schema if form < 0.3 else {**schema, "required": []})
            written = written.replace(', "required": []', "")
        request = a_word("by_schema", rng, new).format(schema=written, text=text)
    return Record(request, properties, {key: values[key] for key in properties})
