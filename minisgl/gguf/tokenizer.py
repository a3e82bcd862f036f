"""A GGUF file's vocabulary, as the tokenizer.json and tokenizer_config.json that would say it.

Two kinds: byte-level BPE with merges ("gpt2"), and SentencePiece's BPE, whose merges follow from
the scores of its tokens ("llama").
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from minisgl.gguf.header import Gguf, shown

Json = dict[str, Any]

MAX_TOKEN = 2**8  # characters of a token that SentencePiece may have merged
KEY = "tokenizer.ggml"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
# Control tokens that end a text whatever the file's own end is, as they do in llama.cpp.
ENDS = """
    <|im_end|> <|endoftext|> <|eot_id|> <|eom_id|> <|end_of_text|> <end_of_turn>
"""
MARK = "▁"  # SentencePiece's space


@dataclass(frozen=True)
class _Splits:
    """How byte-level BPE cuts a text, of which each piece is merged by itself."""

    regex: str | None = None  # GPT-2's own where there is none
    digits: bool = False  # each digit alone, before the regex
    whole: bool = False  # a piece that is a token needs no merges
    composed: bool = False  # texts are put into NFC
    adds_bos: bool = False  # where the file does not say


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_LLAMA3 = _Splits(rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}", whole=True, adds_bos=True)
_QWEN2 = _Splits(rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}", composed=True)
# The names of tokenizer.ggml.pre.
PRE = {
    "gpt-2": _Splits(),
    "smollm": _Splits(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _Splits(
        rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        whole=True,
        adds_bos=True,
    ),
}


@dataclass(frozen=True)
class _Vocabulary:
    tokens: list[str]
    kinds: list[int]  # of each token

    def of_kind(self, *kinds: int) -> list[int]:
        return [i for i, kind in enumerate(self.kinds) if kind in kinds]


def read_tokenizer(file: Gguf) -> tuple[Json, Json]:
    """tokenizer.json and tokenizer_config.json, with the chat template.

    Raises ValueError naming the key for what is missing, wrong or not supported.
    """
    vocabulary = _read_vocabulary(file)
    kind = file.text(f"{KEY}.model")
    if kind == "gpt2":
        described, adds_bos = _byte_level(file, vocabulary)
    elif kind == "llama":
        described, adds_bos = _sentence_piece(file, vocabulary), True
    else:
        raise file.bad(f"{KEY}.model", 'one of "gpt2", "llama"', kind)
    added = vocabulary.of_kind(UNKNOWN, CONTROL, USER_DEFINED)
    described["added_tokens"] = [
        _added(i, vocabulary.tokens[i], vocabulary.kinds[i] != USER_DEFINED)
        for i in added
        if vocabulary.tokens[i].strip(" ")
    ]
    ids = special_ids(file, len(vocabulary.tokens))
    config: Json = {name: vocabulary.tokens[i] for name, i in ids.items()}
    config["add_bos_token"] = adds_bos = file.boolean(f"{KEY}.add_bos_token", adds_bos)
    if file.boolean(f"{KEY}.add_eos_token", False):
        config["add_bos_token"] = adds_bos or None  # as the post-processor says
        if "eos_token" not in config:
            raise file.bad(f"{KEY}.add_eos_token", "false without an eos_token_id", True)
        described["post_processor"] = _with_end(config["eos_token"], ids["eos_token"])
    if template := file.text("tokenizer.chat_template"):
        config["chat_template"] = template
    return described, config


def special_ids(file: Gguf, vocab_size: int) -> dict[str, int]:
    """The tokens with a role that the file names, by transformers' names of the roles."""
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    found = {
        f"{name}_token": file.integer(f"{KEY}.{role}_token_id", vocab_size - 1)
        for role, name in roles.items()
    }
    return {name: i for name, i in found.items() if i is not None}


def end_ids(file: Gguf) -> list[int]:
    """The tokens that end a text: those the file names so, and those known by their spelling."""
    vocabulary = _read_vocabulary(file)
    last = len(vocabulary.tokens) - 1
    named = [file.integer(f"{KEY}.{name}_token_id", last) for name in ("eos", "eot", "eom")]
    known = {*ENDS.split()}
    spelled = [i for i in vocabulary.of_kind(CONTROL) if vocabulary.tokens[i] in known]
    return sorted({*spelled, *(i for i in named if i is not None)})


def _read_vocabulary(file: Gguf) -> _Vocabulary:
    tokens = file.texts(f"{KEY}.tokens")
    if not tokens:
        raise file.bad(f"{KEY}.tokens", "at least one token", 0)
    kinds = [NORMAL] * len(tokens)
    if f"{KEY}.token_type" in file.metadata:
        kinds = file.numbers(f"{KEY}.token_type", len(tokens)).tolist()
    return _Vocabulary(tokens, kinds)


def _ids(file: Gguf, tokens: list[str]) -> dict[str, int]:
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        raise ValueError(f"{file.path}: {KEY}.tokens must all differ, got {shown(twice)} twice")
    return ids


def _byte_level(file: Gguf, vocabulary: _Vocabulary) -> tuple[Json, bool]:
    """As of GPT-2; and whether a text begins with a BOS token where the file does not say."""
    name = file.text(f"{KEY}.pre")
    if name not in PRE:
        raise file.bad(f"{KEY}.pre", f"one of {', '.join(PRE)}", name)
    splits, merges = PRE[name], [merge.split(" ") for merge in file.texts(f"{KEY}.merges")]
    if wrong := next((merge for merge in merges if len(merge) != 2), None):
        raise file.bad(f"{KEY}.merges", "two tokens with a space between", " ".join(wrong))
    steps: list[Json] = [{"type": "Digits", "individual_digits": True}] if splits.digits else []
    if splits.regex is not None:
        pattern = {"Regex": splits.regex}
        steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps.append(byte_level | {"use_regex": splits.regex is None})
    model = {"vocab": _ids(file, vocabulary.tokens), "merges": merges}
    return {
        "normalizer": {"type": "NFC"} if splits.composed else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "decoder": byte_level | {"use_regex": True},
        "model": {"type": "BPE", "ignore_merges": splits.whole, **model},
    }, splits.adds_bos


def _sentence_piece(file: Gguf, vocabulary: _Vocabulary) -> Json:
    """As of Llama 2, with a space before each part of a text unless the file says otherwise."""
    # Runs of spaces are written as such, unlike the spaces of other tokens.
    tokens = [token if token.strip(" ") else MARK * len(token) for token in vocabulary.tokens]
    ids = _ids(file, tokens)
    unknown = special_ids(file, len(tokens)).get("unk_token")
    space = {"String": MARK}
    normalizers = [{"type": "Replace", "pattern": {"String": " "}, "content": MARK}]
    decoders: list[Json] = [
        {"type": "Replace", "pattern": space, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if file.boolean(f"{KEY}.add_space_prefix", True):
        normalizers = [{"type": "Prepend", "prepend": MARK}, *normalizers]
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "unk_token": None if unknown is None else tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": _merges(file, ids),
        },
    }


def _merges(file: Gguf, ids: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make a token, the best first: by score, of Gemma by id.

    Gemma's scores do not tell the order in which its tokens were merged; that of the ids does.
    """
    scores = file.numbers(f"{KEY}.scores", len(ids))
    if str(file.metadata.get("general.architecture")).startswith("gemma"):
        scores = -np.arange(len(ids))
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(ids, scores.tolist(), strict=True):
        if len(token) > MAX_TOKEN:
            raise file.bad(f"{KEY}.tokens", f"of at most {MAX_TOKEN} characters", len(token))
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-score, ids[token], -cut, left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _added(token_id: int, text: str, special: bool) -> Json:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": text, "special": special, **plain}


def _with_end(token: str, token_id: int) -> Json:
    """A text, then the token that ends it."""
    end, texts = {"SpecialToken": {"id": token, "type_id": 0}}, []
    for name in "AB":
        texts += [{"Sequence": {"id": name, "type_id": 0}}, end]
    return {
        "type": "TemplateProcessing",
        "single": texts[:2],
        "pair": texts,
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
