"""Patterns of JSON schemas, made safe for llguidance.

It writes a pattern's characters as JSON does, and takes a class that has all control characters for
one of every character: `[^"]` would let an escaped quote pass. Such a class is given without
U+0001, so that it is read as it stands. That no class matches U+0001 then errs on the safe side.
"""

import re

CLASS = re.compile(r"\\.|\[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]", re.DOTALL)
CONTROL = [chr(code) for code in range(32) if chr(code) != "\n"]


def safe_pattern(pattern: str) -> str:
    """The same pattern, its classes read as they stand."""
    return CLASS.sub(lambda found: _safe(found[0]), pattern)


def _safe(text: str) -> str:
    """A class, or an escaped character."""
    if not text.startswith("[") or not _is_misread(text):
        return text
    return rf"[^\x01{text[2:]}" if text.startswith("[^") else rf"{text[:-1]}--\x01]"


def _is_misread(text: str) -> bool:
    try:
        fits = re.compile(text, re.ASCII).fullmatch
    except re.error:  # another syntax, as \p{L}
        return True
    return all(map(fits, CONTROL)) and not (fits('"') and fits("\\"))
