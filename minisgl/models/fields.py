"""Reading a JSON object field by field: a field that is missing or wrong is named."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fields:
    """`values` of the file or section `where`, with `defaults` for what may be left out.

    Every reader raises ValueError naming file, field and value. A default is taken as it is.
    """

    values: Mapping[str, Any]
    where: str
    defaults: Mapping[str, Any]

    def given(self, name: str) -> bool:
        return self.values.get(name) is not None

    def raw(self, name: str) -> Any:
        """The value, null included. Raises ValueError where the field is missing."""
        if name in self.values:
            return self.values[name]
        if name in self.defaults:
            return self.defaults[name]
        raise ValueError(f"{self.where} has no field {name!r}")

    def bad(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"{self.where}: {name} must be {wanted}, got {self.raw(name)!r}")

    def integer(self, name: str, minimum: int = 1) -> int:
        value = self.raw(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise self.bad(name, f"an integer of at least {minimum}")
        return value

    def number(self, name: str) -> float:
        value = self.raw(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise self.bad(name, "a number greater than 0")
        return float(value)

    def boolean(self, name: str) -> bool:
        value = self.raw(name)
        if not isinstance(value, bool):
            raise self.bad(name, "true or false")
        return value

    def text(self, name: str, choices: Mapping[str, Any]) -> str:
        value = self.raw(name)
        if not isinstance(value, str) or value not in choices:
            raise self.bad(name, f"one of {list(choices)}")
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self.raw(name) is None else self.integer(name)

    def optional_number(self, name: str) -> float | None:
        return None if self.raw(name) is None else self.number(name)

    def integers(self, name: str) -> tuple[int, ...]:
        """An integer or a list of them; null is none at all."""
        value = self.raw(name)
        values = [] if value is None else value if isinstance(value, list | tuple) else [value]
        if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
            raise self.bad(name, "an integer of at least 0, or a list of them")
        return tuple(values)
