"""Long texts: pieces have the ids of the whole, and no text has fewer tokens than is said."""

import json
import random
import re
from pathlib import Path

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

import minisgl
from minisgl.core.executor import Limits
from minisgl.server import pieces, tokenizer
from minisgl.server.body import ApiError
from minisgl.server.calls import ServedModel
from minisgl.server.chat import parse_chat
from minisgl.server.chat_template import ChatTemplate
from minisgl.server.completions import parse_completion
from minisgl.server.tokenizer import Tokenizer
from tests.server.small_tokenizers import CORPUS, byte_level, sentence_piece

BUNDLED = Path(minisgl.__file__).parent / "assets/tiny"

# Pre-tokenizers' regexes in the wild. What is no part of a match stays whole.
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
ENDING = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
REGEXES = {
    "llama 3": rf"{SHORT}|{LETTERS}|\p{{N}}{{1,3}}|{ENDING}",
    "qwen": rf"{SHORT}|{LETTERS}|\p{{N}}|{ENDING}",
    "o200k": rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{SHORT}?|"
    rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{SHORT}?|\p{{N}}{{1,3}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "deepseek": r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|"""
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "two words": r"\p{L}+ \p{L}+|\s+|\S",
    "lines": r"[^\n]+|\n",
}
WHOLE = {  # a cut could change ids, or it is not known that it could not
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\s++$|\s+(?!\S)|\s",
    "gaps": r"\p{L}+|\p{N}+",
    "lookbehind": r"(?<=a) x|\s+|\S+",
    "optional": r" ?\p{L}*|\s|\S",
    "only before space": r"\S+|\s+(?!\S)",
}
ALPHABET = [
    *" \n\n  ,.，。'’-_!?<>|aAbeéßя0159缓存中ス한ㄱ\u0301\u0308🚀\t\r▁",
    *("'s", "'ll", "the ", "The", " token", "<s>", "<|im_end|>", "two words", "\r\n", "   "),
    *("e\u0301", "▁▁", " <s> ", "s <|im_end|>  "),
]


def trained(regex: str, normalizer: object = None) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(regex), "isolated")
    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([split, spell])
    if normalizer is not None:
        made.normalizer = normalizer
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, trainer)
    return made


def metaspace(*, split: bool, unigram: bool = False) -> tokenizers.Tokenizer:
    """A unigram, or Llama 2's BPE as transformers converts it today."""
    if unigram:
        made = tokenizers.Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
        )
        made.pre_tokenizer = pre_tokenizers.Metaspace(split=split)
        made.train_from_iterator(CORPUS, trainer)
    else:
        made = tokenizers.Tokenizer.from_str(sentence_piece().to_str())
        made.normalizer = normalizers.Sequence([])
        made.pre_tokenizer = pre_tokenizers.Metaspace(split=split, prepend_scheme="first")
    made.decoder = decoders.Metaspace()
    return made


def joined_words() -> tokenizers.Tokenizer:
    """Llama 2's kind, with a token that reaches across a space."""
    made = sentence_piece()
    vocab, (unk, *_) = made.get_vocab(), ["<unk>"]
    vocab["o▁"] = len(vocab)
    merges = [("o", "▁")]
    made = tokenizers.Tokenizer.from_str(made.to_str())
    made.model = models.BPE(vocab, merges, unk_token=unk, byte_fallback=True, fuse_unk=True)
    return made


def no_bytes() -> tokenizers.Tokenizer:
    """A run of characters that it does not know is one token, however long."""
    made = tokenizers.Tokenizer(
        models.BPE({"<unk>": 0, "a": 1, "▁": 2, "é": 3}, [], unk_token="<unk>", fuse_unk=True)
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    made.decoder = decoders.Replace("▁", " ")
    return made


def stripping() -> tokenizers.Tokenizer:
    """Phi's kind: a mark takes the spaces beside it."""
    made = trained(REGEXES["qwen"])
    made.add_tokens([tokenizers.AddedToken("<|end|>", rstrip=True, lstrip=True)])
    return made


KINDS = {
    **{name: (lambda regex=regex: trained(regex)) for name, regex in REGEXES.items()},
    "qwen with NFC": lambda: trained(REGEXES["qwen"], normalizers.NFC()),
    "gpt 2": lambda: trained(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+|" + ENDING),
    "sentencepiece": sentence_piece,
    "sentencepiece, first": lambda: metaspace(split=False),
    "unigram": lambda: metaspace(split=True, unigram=True),
    "stripping": stripping,
    "no bytes": no_bytes,
    "bundled": lambda: tokenizers.Tokenizer.from_file(str(BUNDLED / "tokenizer.json")),
}
WHOLE_KINDS = {
    **{name: (lambda regex=regex: trained(regex)) for name, regex in WHOLE.items()},
    "lower case": lambda: trained(REGEXES["qwen"], normalizers.Lowercase()),
    "a token of two words": byte_level,
    "a token across a space": joined_words,
    "unigram of whole texts": lambda: metaspace(split=False, unigram=True),
}


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(pieces, "PIECE", 20)
    monkeypatch.setattr(tokenizer, "PIECE", 20)
    monkeypatch.setattr(pieces, "WINDOW", 64)


def texts(seed: int, count: int = 500):
    rng = random.Random(seed)
    for _ in range(count):
        yield "".join(rng.choices(ALPHABET, k=rng.randint(1, 120)))


def compare(backend: tokenizers.Tokenizer, seed: int) -> int:
    """Checks both promises over many texts; returns how many pieces there were."""
    ours = Tokenizer(backend, {})
    spell = {token: ours.token_bytes(i) for token, i in backend.get_vocab().items()}
    long, count = pieces.LongTexts(backend, spell.__getitem__), 0
    for text in texts(seed):
        whole = backend.encode(text, add_special_tokens=False).ids
        found = list(long.pieces(text))
        ids = [backend.encode(piece, add_special_tokens=False).ids for piece in found]
        assert [i for each in ids for i in each] == whole, (text, found)
        assert long.fewest_tokens(text) <= len(whole), text
        count += len(found)
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_have_the_ids_of_the_whole(kind):
    assert compare(KINDS[kind](), seed=1) > 750


@pytest.mark.parametrize("kind", WHOLE_KINDS)
def test_where_a_cut_is_not_proved_safe_a_text_stays_whole(kind):
    assert compare(WHOLE_KINDS[kind](), seed=2) == 500


class Counted:
    """A backend that notes how many bytes are encoded, and in pieces of which size."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self.sizes: list[int] = []

    def encode_batch_fast(self, texts, **options):
        self.sizes += [len(text.encode()) for text in texts]
        return self._backend.encode_batch_fast(texts, **options)

    def __getattr__(self, name):
        return getattr(self._backend, name)


@pytest.fixture
def counted():
    return Counted(KINDS["bundled"]())


def refused(counted: Counted, text: str, parse=parse_completion) -> int:
    """The number of tokens that the refusal of a prompt names."""
    limits = Limits(num_pages=1024, page_size=1, max_rows=8, max_context=1024, vocab_size=2048)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    model = ServedModel("test-model", Tokenizer(counted, {}, template), limits)
    field = {"prompt": text} if parse is parse_completion else {"messages": [user(text)]}
    with pytest.raises(ApiError, match="maximum context length is 1024 tokens") as caught:
        parse(json.dumps(field).encode(), model)
    error = caught.value.body["error"]
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == next(iter(field))
    return int(re.search(r"has at least (\d+) tokens", error["message"])[1])


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("text", ["word after word, ", "a", " ", "缓存", "\n"])
@pytest.mark.parametrize("parse", [parse_completion, parse_chat])
def test_what_cannot_fit_is_refused_before_it_is_encoded(counted, text, parse):
    refused(counted, text * (2**20 // len(text.encode())), parse)
    assert counted.sizes == []


def test_what_does_not_fit_is_encoded_up_to_there(counted):
    text = CORPUS[0] * 160  # 10 KB: too long, which no count of bytes can tell
    least = refused(counted, text)
    assert 1024 < least < 1024 + 20
    assert sum(counted.sizes) < 0.6 * len(text)
    assert max(counted.sizes) < 40


@pytest.mark.parametrize("kind", ["bundled", "sentencepiece"])
def test_what_a_tokenizer_puts_around_a_text_is_put_around_the_pieces(kind):
    backend = tokenizers.Tokenizer.from_str(KINDS[kind]().to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    ours = Tokenizer(backend, {})
    for text in texts(seed=3, count=50):
        for special in (True, False):
            expected = backend.encode(text, add_special_tokens=special).ids
            assert ours.encode(text, add_special_tokens=special) == expected
