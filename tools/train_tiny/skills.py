"""Tools, and requests that need them: families of real ones, and made-up ones (verb and noun).

A `Skill` is a tool as one chat shows it: names of tools and parameters, their order and their
descriptions vary from chat to chat, so that the model must read them. What is `new` is for the
evaluation only: tools, names, phrasings and values that training never saw.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tools.train_tiny import tasks, words

TOOLS = words.TOOLS
TASK: dict[str, list[str]] = words.WORDS["task"]
LANGUAGES = ["French", "German", "Spanish", "Italian", "Greek", "Polish", "Dutch", "Turkish"]
NEW_LANGUAGES = ["Danish", "Korean", "Arabic"]

Schema = dict[str, Any]
Kind = str | list[str]  # of a value; a list is an enum


@dataclass(frozen=True)
class Parameter:
    """One parameter as its tool shows it, and how requests say it (`says[1]`: that it is not)."""

    name: str  # by which requests know it
    key: str
    kind: Kind
    says: tuple[list[str], list[str]] = ((), ())  # type: ignore[assignment]
    about: str = ""

    @property
    def schema(self) -> Schema:
        if isinstance(self.kind, list):
            schema: Schema = {"type": "string", "enum": self.kind}
        else:
            types = {"integer": "integer", "small": "integer", "number": "number"}
            types["boolean"] = "boolean"
            schema = {"type": types.get(self.kind, "string")}
        return {**schema, "description": self.about} if self.about else schema


@dataclass(frozen=True)
class Skill:
    """A tool with the patterns of its requests; `like` is equal for those that do the same."""

    name: str
    about: str
    parameters: tuple[Parameter, ...]
    asks: tuple[str, ...]
    like: tuple[str, ...]

    @property
    def tool(self) -> Schema:
        """The tool as a chat body holds it."""
        properties = {p.key: p.schema for p in self.parameters}
        needed = [p.key for p in self.parameters if not p.says[0]]
        parameters = {"type": "object", "properties": properties, "required": needed}
        about = {"description": self.about} if self.about else {}
        return {
            "type": "function",
            "function": {"name": self.name, **about, "parameters": parameters},
        }


@dataclass(frozen=True)
class Request:
    """What a user asks, and the calls that are right."""

    text: str
    calls: tuple[tuple[str, dict[str, Any]], ...]
    topic: int | None = None  # None where two tools are asked for


def a_word(name: str, rng: random.Random, new: bool) -> Any:
    """One of a list of `tools.toml`; of its held-out words where it is `new`."""
    return rng.choice(TOOLS["held_out_" + name if new else name])


def _any_word(name: str, rng: random.Random, new: bool) -> str:
    """A word of the list or, of those not held out, a made-up one, which can only be copied."""
    if not new and rng.random() < 0.3:
        return tasks.made_up_name(rng).lower()
    return str(a_word(name, rng, new))


def _name(rng: random.Random, new: bool) -> str:
    if not new and rng.random() < 0.5:
        return tasks.made_up_name(rng)
    return rng.choice(TASK["held_out_given" if new and rng.random() < 0.5 else "given"])


def _full_name(rng: random.Random, new: bool) -> str:
    return " ".join(_name(rng, new) for _ in range(1 if rng.random() < 0.6 else 2))


def _city(rng: random.Random, new: bool) -> str:
    if not new and rng.random() < 0.5:
        return tasks.made_up_name(rng)
    return rng.choice(TASK["held_out_cities" if new and rng.random() < 0.5 else "cities"])


def _phrase(rng: random.Random, new: bool) -> str:
    if rng.random() < 0.3:
        return str(a_word("phrases", rng, new))
    verb, noun = _any_word("verbs", rng, new), _any_word("nouns", rng, new)
    ends = ("", "", " now", " of " + _name(rng, new), " in " + _city(rng, new))
    return f"{verb} the {noun}{rng.choice(ends)}"


def _topic(rng: random.Random, new: bool) -> str:
    if rng.random() < 0.3:
        return str(a_word("topics", rng, new))
    noun = _any_word("nouns", rng, new)
    more = f"{noun}s in {_city(rng, new)}", f"{_word(rng, new)} {noun}"
    return rng.choice((_name(rng, new), *more))


def _word(rng: random.Random, new: bool) -> str:
    if not new and rng.random() < 0.4:
        return tasks.made_up_name(rng).lower()
    return str(a_word(rng.choice(("nouns", "products")), rng, new))


def _thing(name: str, rng: random.Random, new: bool) -> str:
    """One of a short list, more often any noun: so that it is copied, not remembered."""
    if new or rng.random() < 0.4:
        return str(a_word(name, rng, new))
    return _any_word("nouns", rng, new)


def _firm(rng: random.Random, new: bool) -> str:
    if not new and rng.random() < 0.5:
        return tasks.made_up_name(rng)
    return str(a_word("firms", rng, new))


def _integer(rng: random.Random, _: bool) -> int:
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 4)))


def _number(rng: random.Random, _: bool) -> float:
    whole = rng.randrange(10 ** rng.choice((1, 2, 3)))
    return whole if rng.random() < 0.5 else round(whole + rng.randint(1, 9) / 10, 1)


def _code(rng: random.Random, _: bool) -> str:
    letters = "".join(rng.choice("ABCDEFGHKLMNPRSTVXZ") for _ in range(rng.randint(1, 3)))
    return f"{letters}{rng.choice(('', '-'))}{rng.randrange(100, 100_000)}"


def _email(rng: random.Random, new: bool) -> str:
    host = rng.choice(("mail.com", "example.org", "post.de", "example.com"))
    return f"{_name(rng, new).lower()}@{host}"


def _file(rng: random.Random, new: bool) -> str:
    return f"{_word(rng, new)}.{rng.choice(('txt', 'md', 'json', 'py', 'csv'))}"


def _date(rng: random.Random, _: bool) -> str:
    return f"20{rng.randint(20, 39)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


KINDS: dict[str, Callable[[random.Random, bool], Any]] = {
    "name": _full_name,
    "name1": _name,
    "city": _city,
    "phrase": _phrase,
    "topic": _topic,
    "word": _word,
    "integer": _integer,
    "small": lambda rng, _: rng.randint(1, 30),
    "number": _number,
    "boolean": lambda rng, _: rng.random() < 0.6,
    "code": _code,
    "email": _email,
    "file": _file,
    "date": _date,
    "time": lambda rng, _: f"{rng.randrange(24)}:{rng.randrange(60):02}",
    "product": lambda rng, new: _thing("products", rng, new),
    "room": lambda rng, new: _thing("rooms", rng, new),
    "firm": _firm,
    "currency": lambda rng, _: a_word("currencies", rng, False),
    "language": lambda rng, new: rng.choice(NEW_LANGUAGES if new else LANGUAGES),
}


def value(kind: Kind, rng: random.Random, new: bool) -> Any:
    return rng.choice(kind) if isinstance(kind, list) else KINDS[kind](rng, new)


def in_words(key: str) -> str:
    """`max_size` and `maxSize` as a user says them."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", key).replace("_", " ").lower()


def _about(parameter: str, rng: random.Random, new: bool) -> str:
    said = in_words(parameter)
    return str(a_word("said_about", rng, new)).format(key=said, Key=said.capitalize())


def _decorated(name: str, rng: random.Random) -> str:
    """A name with something before or behind it, sometimes."""
    made = tasks.made_up_name(rng).lower()
    odd = (f"{made}_{name}", f"{name}_{made}", f"my_{name}", f"{name}_{rng.randint(1, 9)}")
    return rng.choice(odd) if rng.random() < 0.25 else name


FAMILY_SHARE = 0.8  # of tools; the others are made up
FAMILIES: dict[bool, list[dict[str, Any]]] = {
    False: TOOLS["family"],
    True: TOOLS["held_out_family"],
}


# What texts are about, as the numbers of trained kinds of tools: alike where these do the same.
# Behind them all made-up tools, and requests that need no tool.
TOPICS = sorted({family.get("like", family["names"][0]) for family in FAMILIES[False]})
MADE_UP, NO_TOOL = len(TOPICS), len(TOPICS) + 1


def topic(like: tuple[str, ...]) -> int:
    """Of a skill by its `like`."""
    return TOPICS.index(like[0]) if len(like) == 1 and like[0] in TOPICS else MADE_UP


def family_skill(rng: random.Random, new: bool = False, family: Schema | None = None) -> Skill:
    """A tool of one of the families, with the parameters that its requests need and some others."""
    family = family or rng.choice(FAMILIES[new])
    asks = family["held_out_asks"] if new else family["asks"]
    described, parameters = rng.random() < 0.3, []
    for name, given in family.get("params", {}).items():
        optional = "{" + name + "}" not in asks[0]
        if optional and rng.random() < 0.5:
            continue
        says: tuple[list[str], list[str]] = ([], [])
        if optional:
            says = given.get("on", given.get("said", [])), given.get("off", [])
        key = rng.choice(given["keys"])
        if not new and not optional and len(family["params"]) == 1 and rng.random() < 0.1:
            key = tasks.made_up_name(rng).lower()
        about = _about(name, rng, new) if described else ""
        parameters.append(Parameter(name, key, given["kind"], says, about))
    keys = {parameter.key for parameter in parameters}
    if len(keys) < len(parameters):  # two of the same key
        return family_skill(rng, new, family)
    if rng.random() < 0.3:
        rng.shuffle(parameters)
    name, about = rng.choice(family["names"]), rng.choice(family["about"])
    if not new:
        name = tasks.made_up_name(rng).lower() if rng.random() < 0.08 else _decorated(name, rng)
    about = "" if rng.random() < 0.2 and name in family["names"] else about
    like = (family.get("like", family["names"][0]),)
    return Skill(name, about, tuple(parameters), tuple(asks), like)


def made_parameter(rng: random.Random, new: bool) -> Parameter:
    """A parameter of any name and kind, which a clause of the request says."""
    draws = (("name1", 4), ("word", 2), ("integer", 5), ("number", 2), ("enum", 4), ("flag", 2))
    kind: Kind = rng.choices([k for k, _ in draws], [w for _, w in draws])[0]
    if kind == "flag":
        key = a_word("flags", rng, new)
        says = TOOLS["flag_on"], TOOLS["flag_off"]
        return Parameter(key, key, "boolean", says)
    kind = a_word("choices", rng, new) if kind == "enum" else kind
    key = str(a_word("keys", rng, new))
    if not new and rng.random() < 0.2:
        key = tasks.made_up_name(rng).lower()
    says = TOOLS["held_out_clauses" if new else "clauses"], []
    return Parameter(key, key, kind, says)


def made_parameters(rng: random.Random, new: bool, count: int) -> list[Parameter]:
    """Parameters of different keys."""
    found: dict[str, Parameter] = {}
    while len(found) < count:
        made = made_parameter(rng, new)
        found[made.key] = made
    return list(found.values())


def _made_name(verb: str, noun: str, rng: random.Random) -> str:
    camel = f"{verb}{noun.capitalize()}"
    forms = (f"{verb}_{noun}", f"{verb}_{noun}", camel, f"{noun}_{verb}", f"{verb}_the_{noun}")
    return rng.choice(forms)


def made_skill(
    rng: random.Random, new: bool = False, verb: str = "", noun: str = "", most: int = 4
) -> Skill:
    """A tool that does something to something, with at most `most` parameters."""
    verb, noun = verb or _any_word("verbs", rng, new), noun or _any_word("nouns", rng, new)
    parameters = made_parameters(rng, new, min(most, rng.choice((0, 1, 1, 2, 2, 3, 4))))
    if rng.random() < 0.2:
        parameters = [
            Parameter(p.name, p.key, p.kind, p.says, _about(p.key, rng, new)) for p in parameters
        ]
    name = _made_name(verb, noun, rng)
    name = name if new else _decorated(name, rng)
    fill = {"verb": verb, "noun": noun, "Verb": verb.capitalize()}
    about = a_word("made_about", rng, new).format(**fill) if rng.random() < 0.7 else ""
    asks = [ask.format(**fill) for ask in TOOLS["held_out_made_asks" if new else "made_asks"]]
    return Skill(name, about, tuple(parameters), tuple(asks), (verb, noun))


def skill(rng: random.Random, new: bool = False, most: int = 4) -> Skill:
    """A tool of a family or a made-up one of at most `most` parameters."""
    is_family = rng.random() < FAMILY_SHARE
    return family_skill(rng, new) if is_family else made_skill(rng, new, most=most)


def _clause(p: Parameter, given: Any, rng: random.Random) -> str:
    patterns = p.says[1] if given is False else p.says[0]
    return str(rng.choice(patterns)).format(key=in_words(p.key), x=given)


def _marked(text: str, rng: random.Random) -> str:
    """A sentence with its first capital and its last mark."""
    first = text[0].upper() + text[1:]
    if rng.random() < 0.15:
        return text
    asks = re.match(r"(Wh|How|Is |Will |Do |Can |Could |Has |Would )", first)
    return first + ("?" if asks else rng.choice((".", ".", "", "!")))


def _said_once(s: Skill, rng: random.Random, new: bool) -> tuple[str, dict[str, Any]]:
    """A request of a skill without its last mark, and the arguments; clauses come in any order."""
    ask = rng.choice(s.asks)
    given: dict[str, Any] = {}
    clauses, fill = [], {}
    for p in s.parameters:
        if "{" + p.name + "}" in ask:
            given[p.key] = fill[p.name] = value(p.kind, rng, new)
        elif p.says[0] and rng.random() < 0.8:
            drawn = value(p.kind, rng, new)
            drawn = True if drawn is False and not p.says[1] else drawn
            given[p.key] = drawn
            clauses.append(_clause(p, drawn, rng))
    rng.shuffle(clauses)
    text = ask.format(**fill)
    for i, clause in enumerate(clauses):
        comma = "," if i and rng.random() < 0.4 else ""
        text += f"{comma} {'and ' if i and comma and not clause.startswith('and') else ''}{clause}"
    return text, given


def request(s: Skill, rng: random.Random, new: bool = False) -> Request:
    """A request that needs one call of the skill."""
    text, given = _said_once(s, rng, new)
    return Request(_marked(text, rng), ((s.name, given),), topic(s.like))


def double_request(s: Skill, other: Skill, rng: random.Random, new: bool = False) -> Request:
    """A request that needs two calls: of one skill for two values, or of two skills."""
    plain = [p for p in s.parameters if p.kind in ("city", "firm", "name1") and not p.says[0]]
    if len(s.parameters) == len(plain) == 1:
        (p,) = plain
        first, second = value(p.kind, rng, new), value(p.kind, rng, new)
        text = rng.choice(s.asks).format(**{p.name: f"{first} and {second}"})
        calls = (s.name, {p.key: first}), (s.name, {p.key: second})
        return Request(_marked(text, rng), calls, topic(s.like))
    one, two = _said_once(s, rng, new), _said_once(other, rng, new)
    joined = rng.choice(("{}, and {}", "{} and then {}", "{}. Then {}", "{}. Also {}"))
    is_name = any(str(given).startswith(two[0].split()[0]) for given in two[1].values())
    second = two[0] if is_name else two[0][0].lower() + two[0][1:]
    text = _marked(joined.format(one[0], second), rng)
    return Request(text, ((s.name, one[1]), (other.name, two[1])))


def written(calls: tuple[tuple[str, dict[str, Any]], ...]) -> str:
    """Calls as the model writes them, and as the chat template shows earlier ones."""
    return "\n".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": '
        f"{json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>"
        for name, arguments in calls
    )


def _typed(schema: Schema) -> str:
    """The type of a parameter, in short."""
    if "enum" in schema:
        text = " | ".join(json.dumps(each, ensure_ascii=False) for each in schema["enum"])
    else:
        text = schema["type"]
    return f"{text} ({schema['description']})" if "description" in schema else text


def prototype(properties: dict[str, Schema]) -> str:
    """An object with the types of its values in their places."""
    return "{" + ", ".join(f'"{key}": {_typed(schema)}' for key, schema in properties.items()) + "}"


def shown(tool: Schema) -> tuple[str, str]:
    """A tool as the chat template shows it: a line that says what it does, and one with a call."""
    function = tool["function"]
    about = f": {function['description'].lower()}" if "description" in function else ""
    arguments = prototype(function["parameters"]["properties"])
    return (
        f"- {in_words(function['name'])}{about}\n",
        f'{{"name": "{function["name"]}", "arguments": {arguments}}}\n',
    )
