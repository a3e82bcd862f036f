"""Long texts: where one may be cut so that its pieces have the ids of the whole, and how few tokens
it can have. Both follow from the tokenizer's own description; what does not is not done.

A cut stands between a letter or digit and a separator. It changes no id where no step of the
tokenizer looks across it:

- normalizers: NFC composes nothing with a separator; the others allowed act on each space alone;
- pre-tokenizers: no match of a regex reaches across, and a match begins at every separator;
- a BPE without such a regex: no token of its vocabulary holds both sides, so no merge joins them.
"""

import itertools
import json
import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import tokenizers
from tokenizers import Regex
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Split

PIECE = 2**14  # characters of a piece, at least
WINDOW = 2**16  # characters looked at before other threads may run
SEPARATORS = " \n,.，。"
# Letters and digits that NFC leaves as they are, whatever stands before them.
_RANGES = ("0-9", "A-Z", "a-z", "А-я", "ぁ-ゖ", "ァ-ヺ", "一-鿕", "가-힣")
_WORDS = "".join(chr(code) for span in _RANGES for code in range(ord(span[0]), ord(span[2]) + 1))
_WORD = f"[{''.join(_RANGES)}]"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = re.compile(r"\(\?i:[a-z'|\[\]]+\)")
_NFC, _PREPEND = {"type": "NFC"}, {"type": "Prepend", "prepend": "▁"}
_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
# A part of a regex that is understood: a set of characters, and how often one of them stands there.
_PART = re.compile(
    r"(?P<set>\[(?:\\.|[^\[\]\\])+\]|\\(?:[sSdDwWrnt]|p\{\^?\w+\}|[^\w])|[^\\()\[\]{}.^$|?*+])"
    r"(?P<many>[?*+]\+?|\{[1-9]\d*(?:,\d*)?\})?|(?P<bar>\|)"
)


class LongTexts:
    """What is known of one tokenizer. `spell` says which bytes a token of its vocabulary is."""

    def __init__(self, backend: tokenizers.Tokenizer, spell: Callable[[str], bytes]) -> None:
        steps, separators = _steps(backend.normalizer), "".join(_separators(backend))
        self._composes = _NFC in steps
        self._skipped = steps.count(_PREPEND)  # puts a space before each piece: that of the cut
        after = f"[{separators}]{_WORD * self._skipped}"
        self._cut = re.compile(f"{_WORD}(?={after})") if separators else None
        self._shares = _shares(backend, spell)

    def pieces(self, text: str) -> Iterator[str]:
        """The text in pieces whose ids, one after another, are its own; whole where no cut is safe.

        Tokens that a tokenizer puts around every text are left out of this.
        """
        start, at = 0, PIECE
        while self._cut is not None and at < len(text):
            found = self._cut.search(text, at, at + WINDOW)
            at += WINDOW
            if found is not None:
                yield text[start : found.end()]
                start = found.end() + self._skipped
                at = start + PIECE
        yield text[start:]

    def fewest_tokens(self, text: str) -> int:
        """A number of tokens that the text has at least; 0 where nothing is known.

        Of a token of L bytes each byte is 1/L, so a byte is at least 1/M of a token, M being the
        length of the longest token that holds this byte.
        """
        if self._composes and not unicodedata.is_normalized("NFC", text):
            return 0
        found = 0.0
        for start in range(0, len(text), WINDOW):
            spelled = text[start : start + WINDOW].replace("▁", " ").encode(errors="replace")
            found += np.bincount(np.frombuffer(spelled, np.uint8), minlength=256) @ self._shares
        return math.floor(found)


def _steps(part: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, as tokenizer.json describes them."""
    described = {"normalizers": []} if part is None else json.loads(part.__getstate__())
    steps = described.get("normalizers", described.get("pretokenizers", [described]))
    return cast(list[dict[str, Any]], steps)


def _separators(backend: tokenizers.Tokenizer) -> set[str]:
    """Those that a text may be cut at, after a letter or digit."""
    steps = _steps(backend.normalizer)
    if not all(step in (_NFC, _PREPEND, _MARK) for step in steps):
        return set()
    safe, begun, marked = {*SEPARATORS}, set[str](), _MARK in steps
    for step in _steps(backend.pre_tokenizer):
        match step:
            case {"type": "Digits"} | {"type": "Split", "pattern": {"String": " "}}:
                continue  # these look at one character at a time
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": splits}:
                patterns = [_GPT2] * splits
            case {"type": "Metaspace", "replacement": "▁", "split": splits}:
                safe, marked, patterns = safe & {" "}, True, [" ?[^ ]+| "] * splits
            case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"}:
                patterns = [pattern]
            case _:
                return set()
        for kept, beginning in map(_read, patterns):
            safe, begun = safe & kept, begun | beginning
    if _PREPEND in steps:
        safe &= {" "} if marked else set()
    if marked and type(backend.model) is BPE and not backend.model.end_of_word_suffix:
        joined = map(re.compile(f"{_WORD}▁").search, backend.get_vocab())
        begun |= set() if any(joined) else {" "}
    for token in backend.get_added_tokens_decoder().values():
        before, after = f"^{_WORD}" * (_PREPEND in steps), f"|{_WORD}$" * token.rstrip
        if re.search(f"{_WORD}[{SEPARATORS}]{after}" + f"|{before}" * bool(before), token.content):
            return set()
    return safe & begun


def _read(pattern: str) -> tuple[set[str], set[str]]:
    """Separators that no match holds behind a letter or digit, and those that one always begins at.

    Neither where the regex is not understood: it might look back, or further than it matches.
    """
    # Whether a non-space follows plays no part at a cut, where no match ends in a space.
    plain = _CONTRACTIONS.sub("[a-zA-Z']", pattern.replace(r"\s+(?!\S)", r"\s+\s"))
    parts = list(_PART.finditer(plain))
    safe, begun = {*SEPARATORS}, set[str]()
    if "".join(part[0] for part in parts) != plain:
        return set(), set()
    for is_bar, group in itertools.groupby(parts, lambda part: part["bar"] is not None):
        held = [] if is_bar else [(_held(part["set"]), part["many"] or "") for part in group]
        behind = False  # whether a letter or digit may have been matched
        for characters, many in held:
            is_word, repeats = _WORDS in characters, many not in ("", "?", "?+")
            safe -= characters if behind or (is_word and repeats) else set()
            behind |= is_word
        needed = [characters for characters, many in held if many[:1] not in ("?", "*")]
        if held and not needed:  # it may match nothing at all
            return set(), set()
        if len(needed) == 1 and all(many in ("", "+", "++", "?", "*") for _, many in held):
            begun |= needed[0] & {*SEPARATORS}
    return safe, begun


def _held(characters: str) -> set[str]:
    """Which separators a regex's set of characters holds; _WORDS if it holds a letter or digit."""
    split = Split(Regex(characters), "removed").pre_tokenize_str
    return {text for text in (*SEPARATORS, _WORDS) if split(text)[:1] != [(text, (0, len(text)))]}


def _shares(backend: tokenizers.Tokenizer, spell: Callable[[str], bytes]) -> np.ndarray:
    """What part of a token each byte is at least: [256], 0 where a token may spell any number."""
    model, vocabulary = backend.model, backend.get_vocab()
    added = backend.get_added_tokens_decoder().values()
    byte_level = any(step["type"] == "ByteLevel" for step in _steps(backend.pre_tokenizer))
    fallback = {f"<0x{byte:02X}>" for byte in range(256)} <= vocabulary.keys()
    if (
        type(model) is not BPE
        or not (model.byte_fallback if fallback else byte_level and model.unk_token is None)
        or not all(step in (_NFC, _PREPEND, _MARK) for step in _steps(backend.normalizer))
        or any(token.lstrip or token.rstrip for token in added)
    ):
        return np.zeros(256)
    texts = [*map(spell, vocabulary), *(token.content.encode() for token in added)]
    texts.sort(key=len)
    longest = np.full(256, np.inf)
    lengths = list(map(len, texts))
    longest[np.frombuffer(b"".join(texts), np.uint8)] = np.repeat(lengths, lengths)
    return 1 / longest
