"""Arguments of calls that are no JSON as a whole: a grammar of each parameter by itself.

Around a parameter stands what the form of calls has. Its value is JSON, or a text as it is where
the form has such and the schema asks for a string.
"""

import json
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from minisgl.grammar.schema import Reader, Refused, Schema, strings

NEW_LINE = r'"\n"'
# Of a whole object, what is kept; all other keywords tell how its properties depend on each other.
KEPT = {"type", "properties", "required", "additionalProperties", "$defs", "definitions", "$id"}
KEPT |= {"$schema"}
OF_A_TEXT = {"type", "enum", "const", "minLength", "maxLength"}


class Written(NamedTuple):
    """How a form writes a parameter. Texts stand as they are where a mark, `after`, ends them."""

    before: str  # the name stands between these two
    behind_name: str
    after: str
    between: str
    name: str  # a regular expression of names that the schema does not tell
    can_name: Callable[[str], bool]  # whether it can write a name that the schema tells


def _stands_in_a_tag(name: str) -> bool:
    return name == name.strip() != "" and not {">", "\n"} & {*name}


WRITTEN = {
    "xml": Written("<parameter=", ">\n", "</parameter>", "", r"[^>\n]{1,64}", _stands_in_a_tag),
    "python": Written("", "=", "", ", ", r"[A-Za-z_][A-Za-z0-9_]{0,63}", str.isidentifier),
}


class Arguments:
    """The grammar of an object that `reader` has read: `rules`, by which `name` is one.

    texts: parameters that are read as texts or null; options: of schemas within it, for llguidance.
    """

    def __init__(
        self,
        name: str,
        form: str,
        texts: Collection[str],
        schema: Schema,
        reader: Reader,
        options: Any,
    ) -> None:
        self.rules: list[str] = []
        self._name, self._written, self._reader, self._texts = name, WRITTEN[form], reader, texts
        schema = schema if isinstance(schema, dict) else {}
        self._root = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
        self._options = {"x-guidance": options}
        for key in schema.keys() - KEPT:
            reader.leave_out(f"#/{key}", f"{key} is not kept in calls of this form")
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(each, str) for each in required):
            raise Refused("#/required", f"must be an array of strings, got {required!r}")
        for key in sorted({*required} - properties.keys()):
            reader.leave_out("#/required", f"{key!r} is none of the properties")
        if not properties and schema.get("additionalProperties") is not False:
            return self._add_free(schema.get("additionalProperties", True))
        self._add_named([*self._writable(properties, {*required})], {*required})

    def _writable(
        self, properties: dict[str, Schema], required: set[str]
    ) -> Iterator[tuple[str, Schema]]:
        """The properties that calls of this form can have."""
        for key, value in properties.items():
            can_name = self._written.can_name(key)
            if value is not False and can_name:
                yield key, value
                continue
            path = f"#/properties/{key}"
            reason = (
                "no value fits it" if can_name else "calls of this form cannot have such a name"
            )
            if key in required:
                raise Refused(path, reason)
            if not can_name:
                self._reader.leave_out(path, reason)

    def _add_free(self, value: Schema) -> None:
        """Parameters of any name."""
        written, name = self._written, self._name
        key = f"{_said(written.before)} {name.upper()}_KEY {_said(written.behind_name)}"
        more = f"({_said(written.between)} {name}_one)*"
        self.rules += [
            f"{name}: ({name}_one {more})?",
            f"{name}_one: {key} {self._value(f'{name}_free', value, '')}",
            f"{name.upper()}_KEY: /{written.name}/",
        ]

    def _add_named(self, properties: list[tuple[str, Schema]], required: set[str]) -> None:
        """Parameters in their order. `NAME_i`: from the i-th on, where none stands before it;
        `NAME_i_more`: where some do."""
        written = self._written
        between = _said(written.between)
        for i, (key, value) in enumerate(properties):
            at, following = f"{self._name}_{i}", f"{self._name}_{i + 1}"
            one = f"{_said(written.before + key + written.behind_name)} "
            one += self._value(f"{at}_value", value, key)
            self.rules += [
                f"{at}: {one} {following}_more" + ("" if key in required else f" | {following}"),
                f"{at}_more: ({between} {one}){'' if key in required else '?'} {following}_more",
            ]
        end = f"{self._name}_{len(properties)}"
        self.rules += [f"{self._name}: {self._name}_0", f'{end}: ""', f'{end}_more: ""']

    def _value(self, name: str, schema: Schema, key: str) -> str:
        after = self._written.after
        if after and (key in self._texts or schema in (True, {})):
            return f"{self._text_value(name, schema, key)} {NEW_LINE}"
        shared, outward = self._named_by(schema)
        if outward:
            reason = f"$ref to {outward[0]!r}, which is not in $defs, is not kept in this form"
            self._reader.leave_out(_place(key), f"{reason} of calls")
            schema, shared = True, {}
        whole = schema if isinstance(schema, dict) else {}
        self.rules.append(f"{name}: %json {json.dumps(whole | shared | self._options)}")
        return f"{name} {NEW_LINE} {_said(after)} {NEW_LINE}" if after else name

    def _named_by(self, schema: Schema) -> tuple[dict[str, Any], list[str]]:
        """Those of $defs and definitions that the schema needs, and references to other places."""
        found: dict[str, dict[str, Any]] = {}
        outward, waiting = list[str](), [*strings(schema, "$ref")]
        while waiting:
            reference = waiting.pop()
            kind, _, rest = reference.removeprefix("#/").partition("/")
            name = rest.split("/")[0].replace("~1", "/").replace("~0", "~")
            if not reference.startswith("#/") or name not in self._root.get(kind, {}):
                outward.append(reference)
            elif name not in found.setdefault(kind, {}):
                found[kind][name] = self._root[kind][name]
                waiting += strings(found[kind][name], "$ref")
        return found, outward

    def _text_value(self, name: str, schema: Schema, key: str) -> str:
        """A text as it is, and the mark behind it."""
        if not isinstance(schema, dict) or _asks_for_types_alone(schema):
            return self._ended(name, r"(?s:.*)")
        path, after = _place(key), self._written.after
        for key in sorted(schema.keys() - OF_A_TEXT):
            reason = f"{key} of a text is not kept in calls of this form"
            self._reader.leave_out(f"{path}/{key}", reason)
        least, most = (schema.get(f"{which}Length") for which in ("min", "max"))
        for bound in (least, most):
            if bound is not None and (type(bound) is not int or bound < 0):
                raise Refused(path, f"lengths must be whole numbers of 0 or more, got {bound!r}")
        if most is not None and most < (least or 0):
            raise Refused(path, f"minLength ({least}) is greater than maxLength ({most})")
        lists = [schema["enum"]] if "enum" in schema else []
        lists += [[schema["const"]]] if "const" in schema else []
        if lists:
            kinds = schema.get("type")
            texts = _texts_of(lists, least or 0, most, isinstance(kinds, list) and "null" in kinds)
            if not texts or any(after in text for text in texts):
                raise Refused(
                    path, f"must be one of texts without {after} that fit, got {lists[0]!r}"
                )
            choices = " | ".join(_said(f"{text}\n{after}") for text in texts)
            self.rules.append(f"{name.upper()}: {choices}")
            return name.upper()
        if least is None and most is None:
            return self._ended(name, r"(?s:.*)")
        # Without the first character of the mark that ends it, so that all others can be counted.
        count = f"{least or 0},{'' if most is None else most}"
        return self._ended(name, f"[^{after[0]}]{{{count}}}\\n")

    def _ended(self, name: str, pattern: str) -> str:
        """A text up to the first mark that ends it."""
        self.rules.append(f"{name}[suffix={json.dumps(self._written.after)}]: /{pattern}/")
        return name


def _texts_of(lists: list[Any], least: int, most: int | None, has_null: bool) -> list[str]:
    """The texts that all of the lists have, and that are so long. With null, which stands for
    itself, not those that would be read as it."""
    if not all(_is_list(each) for each in lists):
        return []
    values = [value for value in lists[0] if all(value in each for each in lists)]
    texts = [text for text in values if isinstance(text, str) and least <= len(text)]
    texts = [text for text in texts if most is None or len(text) <= most]
    if has_null:
        texts = [text for text in texts if text.strip() not in ("null", "None")]
        texts += ["null"] * (None in values)
    return texts


def _is_list(value: object) -> bool:
    return isinstance(value, list)


def _place(key: str) -> str:
    """Where the schema of a parameter stands; without a name, of those that are not named."""
    return f"#/properties/{key}" if key else "#/additionalProperties"


def _said(text: str) -> str:
    return json.dumps(text)


def _asks_for_types_alone(schema: dict[str, Any]) -> bool:
    """By itself, or by its branches."""
    if schema.keys() <= {"type"}:
        return True
    ((key, parts), *more) = schema.items()
    return (
        not more
        and key in ("anyOf", "oneOf")
        and bool(parts)
        and all(isinstance(part, dict) and part.keys() == {"type"} for part in parts)
    )
