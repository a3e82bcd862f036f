"""The corpus' data files, read once: words and sentence patterns, facts, and tools."""

import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def read(name: str) -> dict[str, Any]:
    """The tables of one of the TOML files beside this module."""
    return tomllib.loads((HERE / name).read_text())


WORDS = read("words.toml")
FACTS = read("knowledge.toml")
TOOLS = read("tools.toml")
