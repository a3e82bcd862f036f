"""Vocabularies of GGUF files against the tokenizers they came from and transformers' reading."""

import json
import random
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from minisgl.gguf.header import read_gguf
from minisgl.gguf.tokenizer import end_ids
from minisgl.server.tokenizer import Tokenizer
from tests.server.small_tokenizers import CHAT_TEMPLATE, CORPUS
from tests.world.gguf_files import finish, sentencepiece, write_byte_level

TEXTS = [
    *CORPUS[:4],
    "",
    " ",
    "  two spaces,\n\n\n tabs\t\tand 1234567 numbers 3.14",
    "I'll SAY it's we'Re HTTPServer camelCase naïve cafe\u0301 مرحبا 𝔘𝔫𝔦 <0x41> ▁ x▁y",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def save(path: Path, fill: Callable[[gguf.GGUFWriter], None], arch: str = "llama") -> Path:
    writer = gguf.GGUFWriter(path / "model.gguf", arch)
    fill(writer)
    finish(writer)
    return path / "model.gguf"


def trained(splits: list[pre_tokenizers.PreTokenizer]) -> tokenizers.Tokenizer:
    """A byte-level BPE whose texts are cut so, with merges enough for cuts to show."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" 12345 67 ab's ".join(TEXTS)] * 3, trainer)
    return tokenizer


def write_bpe(writer: gguf.GGUFWriter, tokenizer: tokenizers.Tokenizer, pre: str) -> None:
    described = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(described["vocab"], key=described["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in described["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(3)


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


@pytest.mark.parametrize(
    ("pre", "splits"),
    [("gpt-2", [GPT2]), ("smollm", [pre_tokenizers.Digits(individual_digits=True), GPT2])],
)
def test_byte_level_equals_the_tokenizer_it_came_from(pre: str, splits, tmp_path: Path) -> None:
    oracle = trained(splits)
    ours = Tokenizer.from_directory(save(tmp_path, lambda w: write_bpe(w, oracle, pre)))
    for text in TEXTS:
        ids = ours.encode(f"<|im_start|>{text}<|im_end|>")
        assert ids == oracle.encode(f"<|im_start|>{text}<|im_end|>").ids
        assert ours.decode(ids) == text
    assert (ours.bos_token_id, ours.eos_token_id) == (0, 3)


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2", "tekken"])
def test_byte_level_equals_transformers(pre: str, tmp_path: Path) -> None:
    """But that Qwen's own tokenizers put texts into NFC, which transformers leaves out here."""
    coded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    path = save(tmp_path, lambda w: write_bpe(w, trained([coded]), pre))
    ours = Tokenizer.from_directory(path)
    oracle = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in TEXTS:
        given = unicodedata.normalize("NFC", text) if pre == "qwen2" else text
        theirs = oracle.encode(given, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == theirs, text
    assert (ours.encode("a")[:1] == [ours.bos_token_id]) is (pre != "qwen2")


PIECES = """
    ▁ e t a o i n s r h l d c u m f p g w y b v k , . = ( ) : ▁t he ▁a ▁the in er ▁s re on ▁c ou nd
    ▁and ing ▁w at is en ▁o or es it ▁i ▁p ▁in ▁to an al ▁f ▁of ar ▁b ed ▁d aa aaaa ▁▁ ▁▁▁▁ ken ▁to
    ken ens token tokens ▁token ▁tokens iv ive ber um ▁n ▁num ▁number
"""
WORDS = [
    "the token and the tokens in a number of tokens",
    " aaaaaaa  hee  theing ▁the",
    "    indented = (tokens): naïve 🚀 1",
    "ou oun ound in ing ining aaaaa",
    "",
]


def pieces() -> tuple[list[str], list[float]]:
    """Scores in an order of their own, so that neither ids nor lengths would do for them."""
    tokens = list(dict.fromkeys(PIECES.split()))
    order = random.Random(5).sample(range(len(tokens)), len(tokens))
    return tokens, [-float(place) for place in order]


def merged(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE: of neighbours that make a token the best by score are joined."""
    parts = list(text)
    while True:
        pairs = [(scores.get(a + b), -i) for i, (a, b) in enumerate(pairwise(parts))]
        best = max((pair for pair in pairs if pair[0] is not None), default=None)
        if best is None:
            return parts
        at = -best[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def spelled(parts: list[str], known: dict[str, float]) -> list[str]:
    """What is no token is its bytes."""
    found: list[str] = []
    for part in parts:
        found += [part] if part in known else [f"<0x{byte:02X}>" for byte in part.encode()]
    return found


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_joins_by_score(prefix: bool, tmp_path: Path) -> None:
    tokens, scores = pieces()

    def fill(writer: gguf.GGUFWriter) -> None:
        sentencepiece(tokens, scores, writer)
        writer.add_add_space_prefix(prefix)

    ours = Tokenizer.from_directory(save(tmp_path, fill))
    known = dict(zip(tokens, scores, strict=True))
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *tokens]
    for text in WORDS:
        marked = (" " * (prefix and text != "") + text).replace(" ", "▁")
        wanted = ["<s>", *spelled(merged(marked, known), known)]
        ids = ours.encode(text)
        assert [names[i] for i in ids] == wanted
        assert ours.decode(ids) == (" " * (prefix and text != "") + text).replace("▁", " ")


def test_gemma_joins_by_id_and_has_runs_of_spaces_as_spaces(tmp_path: Path) -> None:
    tokens, _ = pieces()
    stored = [
        token if token.strip("▁") or len(token) == 1 else " " * len(token) for token in tokens
    ]

    def fill(writer: gguf.GGUFWriter) -> None:
        sentencepiece(stored, [-1000.0] * len(tokens), writer)
        writer.add_add_space_prefix(False)

    path = save(tmp_path, fill, "gemma2")
    ours = Tokenizer.from_directory(path)
    oracle = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in WORDS:
        theirs = oracle.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == theirs, text


def test_what_begins_and_ends_a_text(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        write_byte_level(writer)
        writer.add_add_eos_token(True)
        writer.add_eot_token_id(7)
        writer.add_chat_template(CHAT_TEMPLATE)

    path = save(tmp_path, fill)
    ours = Tokenizer.from_directory(path)
    assert ours.encode("a b")[-1] == ours.eos_token_id == 1
    assert ours.encode("a b", add_special_tokens=False)[-1] != 1
    assert end_ids(read_gguf(path)) == [1, 3, 7]  # 3 is <|im_end|>
    chat = ours.render_chat([{"role": "user", "content": "Hi"}])
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert ours.is_special(3)
    assert not ours.is_special(ours.added_id("two words"))
    assert ours.encode("xtwo words", add_special_tokens=False)[-1] == ours.added_id("two words")


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    def told(fill: Callable[[gguf.GGUFWriter], None], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Tokenizer.from_directory(save(tmp_path, fill))

    def changed(**values: list[Any] | str | int) -> Callable[[gguf.GGUFWriter], None]:
        def fill(writer: gguf.GGUFWriter) -> None:
            write_byte_level(writer)
            for name, value in values.items():
                key = f"tokenizer.ggml.{name}"
                for data in writer.kv_data:
                    data.pop(key, None)
                kinds = {str: writer.add_string, int: writer.add_uint32, list: writer.add_array}
                kinds[type(value)](key, value)

        return fill

    for kind in ("bert", "t5"):  # t5 is SentencePiece's unigram
        told(changed(model=kind), f'ggml.model must be one of "gpt2", "llama", got {kind!r}')
    told(changed(pre="falcon"), "ggml.pre must be one of gpt-2, .*, got 'falcon'")
    told(
        changed(tokens=["a", "b", "a"], token_type=[1, 1, 1]),
        "tokens must all differ, got 'a' twice",
    )
    told(changed(token_type=[1, 1]), r"token_type must be an array of \d+ numbers")
    told(changed(merges=["a b", "a b c"]), "merges must be two tokens with a space .*'a b c'")
    told(changed(merges=["ab cd"]), "holds no valid tokenizer: .*ab")
    told(changed(bos_token_id=10**6), r"bos_token_id must be an integer of 0 to \d+, got 1000000")
    told(lambda writer: None, "ggml.tokens must be an array of strings, got None")
