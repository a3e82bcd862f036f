"""Patterns of JSON schemas, made safe for llguidance, which reads them in Rust's syntax.

It writes a pattern's characters as JSON does, and takes a class that has all control characters for
one of every character: `[^"]` would let an escaped quote pass. So every class that leaves out `"`
or `\\` is given without U+0001: it and what it is united with, as in `[^"x]|x`, are read as they
stand. That no such class matches U+0001 errs on the safe side.

What Rust's syntax reads in another way than JSON schemas' own, as classes within classes, is
refused. No character is read twice (`*+`): Python's expressions let no other thread run.
"""

import re

MAX_PATTERN = 2**13  # characters
TOKEN = re.compile(
    r"\\p(?:[LMNPSZ]|\{[LMNPSZ][a-z]?\})"  # properties without control characters
    r"|(?P<set>\[\^?+\]?+(?:\\.|[^]\[\\&~-]|&(?!&)|~(?!~)|-(?!-))*+\]|\\[pP](?:[^{]|\{[^}\\]*+\}))"
    r"|(?P<class>\[)|(?P<flag>\(\?[a-wyzA-Z-]*+x)|(?P<name>\(\?P?<[^>\[(]*+\[)"
    r"|(?P<first>\x01|\\x01|\\u0001|\\U00000001|\\[xuU]\{0*+1\})"
    r"|\\.|.",
    re.DOTALL,
)
REFUSED: dict[str | None, str] = {
    "class": "a class is not closed, or has an unescaped [, &&, -- or ~~, which are operators",
    "flag": "the flag x is not kept",
    "name": "a group's name may have no [",
    "first": "U+0001 is kept within classes alone",
}


def safe_pattern(pattern: str) -> str:
    """The same pattern, its classes read as they stand. Raises ValueError for what it refuses."""
    if len(pattern) > MAX_PATTERN:
        raise ValueError(f"must have at most {MAX_PATTERN} characters, got {len(pattern)}")
    return TOKEN.sub(_safe, pattern)


def _safe(found: re.Match[str]) -> str:
    if reason := REFUSED.get(found.lastgroup):
        raise ValueError(f"character {found.start()}: {reason}")
    return rf"[{found[0]}--\x01]" if found["set"] and _is_misread(found[0]) else found[0]


def _is_misread(text: str) -> bool:
    try:
        fits = re.compile(text, re.ASCII).fullmatch
    except re.error:  # another syntax, as \p{L}
        return True
    return bool(fits("\x01")) and not (fits('"') and fits("\\"))
