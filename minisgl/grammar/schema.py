"""What of a JSON schema can be kept, checked before it is compiled; every refusal names its place.

llguidance ignores nothing silently, but its errors say neither where nor, of `oneOf` behind a
`$ref`, what could be proved.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from minisgl.grammar.pattern import safe_pattern

MAX_DEPTH = 60  # of schemas within schemas; llguidance reads about as many
MAX_REFERENCES = 500  # places that `$ref` names: each may be within the one before
MAX_WORK = 20_000  # comparisons of `oneOf` branches, and steps of the search for an end
MOST_LEVELS = 10  # that are indented; values within may be written without
SECONDS_TO_LOCATE = 1.0  # begins no compilation later, to find where a schema fails

Schema = Any  # a bool or an object; what else a client sends is refused


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Keyword -> how schemas stand in its value.
ONE = {"additionalProperties", "additionalItems"}
LISTS = {"prefixItems", "anyOf", "oneOf", "allOf"}
NAMED = {"properties", "patternProperties", "$defs", "definitions"}
PLAIN = _words(
    "type const enum $ref $id $anchor $schema required minProperties maxProperties minItems "
    "maxItems minLength maxLength pattern format minimum maximum exclusiveMinimum "
    "exclusiveMaximum multipleOf"
)
ANNOTATIONS = _words(
    "title description default examples example deprecated readOnly writeOnly $comment "
    "$vocabulary discriminator contentMediaType contentEncoding contentSchema"
)
# Keywords that are not supported -> values that ask for nothing.
NOTHING: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    **dict.fromkeys(_words("unevaluatedProperties unevaluatedItems propertyNames"), (True, {})),
    **dict.fromkeys(_words("dependentRequired dependentSchemas dependencies"), ({},)),
}
FORMATS = _words("date-time time date duration email hostname ipv4 ipv6 uuid uri")
TYPES = {"null", "boolean", "integer", "number", "string", "array", "object"}


class Refused(ValueError):
    """A schema that cannot be kept: where, and why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{_cut(path)}: {reason}")


class Reader:
    """Reads one schema. `warnings` say what of it was left out where that is allowed."""

    def __init__(self, root: Schema, *, strict: bool) -> None:
        self.warnings: list[str] = []
        self.levels = 0  # of values within values, as far as they are told
        self._root = root
        self._strict = strict
        self._work = 0
        inner = {k: v for k, v in root.items() if k != "$id"} if isinstance(root, dict) else root
        self._has_bases = bool(strings(inner, "$id"))  # what `#` means depends on the place

    def read(self) -> Schema:
        """The schema without what asks for nothing; `oneOf` may be read as `anyOf`."""
        made = self._read(self._root, "#", 0)
        references = strings(self._root, "$ref")
        if len(references) > MAX_REFERENCES:
            found = len(references)
            raise Refused("#", f"$ref may name {MAX_REFERENCES} places at most, got {found}")
        is_open = self.levels == 0 or bool(references)
        self.levels = MOST_LEVELS if is_open else min(self.levels + 1, MOST_LEVELS)
        if made is False or not self._can_end():
            why = "it is false" if made is False else "what it requires never ends"
            raise Refused("#", f"the schema is unsatisfiable: {why}")
        return made

    def _read(self, node: Schema, path: str, depth: int) -> Schema:
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise Refused(
                path, f"a schema must be an object or a boolean, got {type(node).__name__}"
            )
        if depth > MAX_DEPTH:
            raise Refused(path, f"schemas may be nested {MAX_DEPTH} deep")
        self.levels = max(self.levels, depth)
        made: dict[str, Any] = {}
        for key, value in node.items():
            at = f"{path}/{key}"
            if key in ANNOTATIONS or any(_same(value, each) for each in NOTHING.get(key, ())):
                continue
            if key == "$id" and not str(node.get("$ref", "#")).startswith("#"):
                self.leave_out(at, "what $ref names beside $id depends on the draft")
            elif key == "format" and not (isinstance(value, str) and value in FORMATS):
                self.leave_out(at, f"format {value!r} is not supported")
            elif key == "pattern" and isinstance(value, str):
                try:
                    made[key] = safe_pattern(value)
                except ValueError as error:
                    self.leave_out(at, str(error))
            elif key in PLAIN:
                made[key] = value
            elif key in ONE or (key == "items" and not isinstance(value, list)):
                made[key] = self._read(value, at, depth + 1)
            elif key in LISTS or key == "items":
                if not isinstance(value, list):
                    raise Refused(at, f"must be an array, got {type(value).__name__}")
                made[key] = [self._read(v, f"{at}/{i}", depth + 1) for i, v in enumerate(value)]
                if key == "oneOf" and (pair := self._overlap(made[key])):
                    reason = "oneOf: branches {} and {} are not proved to exclude each other"
                    self.leave_out(at, reason.format(*pair), "it is read as anyOf")
            elif key in NAMED:
                if not isinstance(value, dict):
                    raise Refused(at, f"must be an object, got {type(value).__name__}")
                if key == "patternProperties":
                    self._check_names(value, at)
                made[key] = {k: self._read(v, f"{at}/{k}", depth + 1) for k, v in value.items()}
            else:
                self.leave_out(at, f"{key} is not supported")
        return made

    def _check_names(self, patterns: dict[str, Schema], at: str) -> None:
        """A name that fits no pattern is an additional one: here nothing errs on the safe side."""
        for name in patterns:
            try:
                if safe_pattern(name) != name:
                    raise ValueError("classes without quotes or backslashes are not kept")
            except ValueError as error:
                raise Refused(f"{at}/{name}", str(error)) from error

    def leave_out(self, path: str, reason: str, instead: str = "it is left out") -> None:
        """Warn of what is not kept. Raises Refused where all must be."""
        if self._strict:
            raise Refused(path, reason)
        self.warnings.append(f"{_cut(path)}: {reason}; {instead}")

    # ---- oneOf ----------------------------------------------------------------------------------

    def _overlap(self, branches: list[Schema]) -> tuple[int, int] | None:
        """Two branches that one value may fit, as far as is known; None where there are none."""
        for second in range(len(branches)):
            for first in range(second):
                if not self._exclude(branches[first], branches[second], 0):
                    return first, second
        return None

    def _exclude(self, a: Schema, b: Schema, depth: int) -> bool:
        """Whether it is proved that no value fits both. Keywords looked at in vain narrow a schema
        further, so leaving them out errs on the safe side."""
        self._work += 1
        if self._work > MAX_WORK or depth > MAX_DEPTH:
            return False
        a, b = self._resolve(a), self._resolve(b)
        if a is False or b is False:
            return True
        if not isinstance(a, dict) or not isinstance(b, dict):
            return False
        if _types(a).isdisjoint(_types(b)):
            return True
        values = _values(a), _values(b)
        if values[0] is not None and values[1] is not None:
            self._work += len(values[0]) + len(values[1])
            return {*map(_key, values[0])}.isdisjoint(map(_key, values[1]))
        for one, other in ((a, b), (b, a)):
            for key, needed in (("anyOf", all), ("oneOf", all), ("allOf", any)):
                parts = _list(one.get(key))
                if parts and needed(self._exclude(part, other, depth + 1) for part in parts):
                    return True
        return self._objects_exclude(a, b, depth)

    def _objects_exclude(self, a: Schema, b: Schema, depth: int) -> bool:
        """By a property that one of them requires, and that no value of may fit both."""
        if _types(a) != {"object"} or _types(b) != {"object"}:
            return False
        required = _list(a.get("required")) + _list(b.get("required"))
        names = {name for name in required if isinstance(name, str)}
        return any(self._exclude(_property(a, n), _property(b, n), depth + 1) for n in names)

    def _resolve(self, node: Schema) -> Schema:
        """What a local `$ref` points to; its siblings narrow it further. True where unknown."""
        for _ in range(MAX_DEPTH):
            if not isinstance(node, dict) or "$ref" not in node:
                return node
            node = self._target(node["$ref"])
        return True

    def _target(self, reference: Any) -> Schema:
        return True if self._has_bases else target(self._root, reference)

    # ---- an end ---------------------------------------------------------------------------------

    def _can_end(self) -> bool:
        """Whether some finite value may fit; a schema that requires itself has none."""
        if self._has_bases:
            return self._ends(self._root, {*strings(self._root, "$ref")}, 0)
        ending: set[str] = set()
        waiting = {"#", *strings(self._root, "$ref")}
        while waiting:
            found = {ref for ref in waiting if self._ends(self._target(ref), ending, 0)}
            if "#" in found or self._work > MAX_WORK:
                return True
            if not found:
                return False
            ending |= found
            waiting -= found
        return True

    def _ends(self, node: Schema, ending: set[str], depth: int) -> bool:
        self._work += 1
        if not isinstance(node, dict) or depth > MAX_DEPTH or self._work > MAX_WORK:
            return True
        if "const" in node or "enum" in node:
            return True
        reference = node.get("$ref")
        if isinstance(reference, str) and reference.startswith("#") and reference not in ending:
            return False
        for key, needed in (("anyOf", any), ("oneOf", any), ("allOf", all)):
            parts = _list(node.get(key))
            if parts and not needed(self._ends(part, ending, depth + 1) for part in parts):
                return False
        if _types(node) == {"object"}:
            required = _list(node.get("required"))
            return all(self._ends(_property(node, n), ending, depth + 1) for n in required)
        if _types(node) == {"array"} and node.get("minItems"):
            first = _list(node.get("prefixItems")) or [node.get("items", True)]
            return self._ends(first[0], ending, depth + 1)
        return True


def target(root: Schema, reference: Any) -> Schema:
    """What a local `$ref` names; True where it names no place in the schema."""
    if not isinstance(reference, str) or reference[:2] not in ("", "#", "#/"):
        return True
    node = root
    for part in reference.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(node, dict) and part in node:
            node = node[part]
        elif isinstance(node, list) and part.isdecimal() and int(part) < len(node):
            node = node[int(part)]
        else:
            return True
    return node


def _parts(root: Schema, node: Schema, path: str) -> Iterator[tuple[str, Schema, Schema]]:
    """The schemas directly within one, or behind its `$ref`: path, schema, the one without it."""
    for key, value in node.items() if isinstance(node, dict) else ():
        at = f"{path}/{key}"
        if key == "$ref":
            yield str(value), target(root, value), {k: v for k, v in node.items() if k != key}
        elif key in NAMED and isinstance(value, dict):
            for name, each in value.items():
                yield f"{at}/{name}", each, node | {key: value | {name: True}}
        elif (key in LISTS or key == "items") and isinstance(value, list):
            for i, each in enumerate(value):
                yield f"{at}/{i}", each, node | {key: [*value[:i], True, *value[i + 1 :]]}
        elif key in ONE or key == "items":
            yield at, value, node | {key: True}


def locate(root: Schema, fails: Callable[[Schema], str]) -> tuple[str, str]:
    """Where a schema fails to compile, and the error there. It is followed into what fails by
    itself and is the reason why the schema around it does; then comes the keyword at fault."""
    shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
    end = time.monotonic() + SECONDS_TO_LOCATE

    def error(node: Schema) -> str:
        whole = shared | node if isinstance(node, dict) else node
        return fails(whole) if time.monotonic() < end else ""

    def reason(node: Schema, path: str, found: str) -> tuple[Schema, str, str] | None:
        for at, part, rest in _parts(root, node, path):
            inner = "" if at in seen else error(part)
            if inner and (inner == found or error(rest) != found):
                return part, at, inner
        return None

    step: tuple[Schema, str, str] | None = (root, "#", fails(root))
    seen = set[str]()
    while step is not None:
        node, path, found = step
        seen.add(path)
        step = reason(node, path, found)
    keys = [key for key in node if key not in shared] if isinstance(node, dict) else []
    for key in sorted(keys, key=lambda key: key == "type"):  # what it does not go with says more
        if error({k: v for k, v in node.items() if k != key}) != found:
            return (f"{path}/{key}" if time.monotonic() < end else path), found
    return path, found


def _cut(path: str) -> str:
    return path if len(path) <= 160 else f"{path[:60]}...{path[-90:]}"


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and a == b


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _types(node: dict[str, Any]) -> set[str]:
    """The types that a value may have, by `type`, `const` and `enum`."""
    given = node.get("type")
    named = {given} if isinstance(given, str) else {t for t in _list(given) if isinstance(t, str)}
    types = named & TYPES or TYPES
    if "number" in types:
        types = types | {"integer"}
    values = _values(node)
    return types if values is None else types & {t for value in values for t in _type_of(value)}


def _type_of(value: Any) -> set[str]:
    match value:
        case None:
            return {"null"}
        case bool():
            return {"boolean"}
        case int() | float():
            return {"integer", "number"}
        case str():
            return {"string"}
    return {"array"} if isinstance(value, list) else {"object"}


def _values(node: dict[str, Any]) -> list[Any] | None:
    """All that fit, where they are listed."""
    if "const" in node:
        return [node["const"]]
    return node["enum"] if isinstance(node.get("enum"), list) else None


def _key(value: Any) -> str:
    """The same text for equal values, as 1 and 1.0 are."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, list):
        return f"[{','.join(map(_key, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(sorted(f'{name!r}:{_key(each)}' for name, each in value.items()))}}}"
    return repr(value)


def _property(node: dict[str, Any], name: Any) -> Schema:
    """The schema of a property, as far as it is known."""
    properties = node.get("properties")
    if isinstance(properties, dict) and isinstance(name, str) and name in properties:
        return properties[name]
    return node.get("additionalProperties") is not False or "patternProperties" in node


def strings(node: Any, key: str) -> set[str]:
    """Those that stand under `key` anywhere in `node`."""
    found: set[str] = set()
    stack = [node]
    while stack:
        each = stack.pop()
        if isinstance(each, dict):
            if isinstance(each.get(key), str):
                found.add(each[key])
            stack += each.values()
        elif isinstance(each, list):
            stack += each
    return found
