"""Where tokens begin in an echoed prompt and in an answer's text."""

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors

from minisgl.server.echo import Echo, Offsets
from minisgl.server.tokenizer import Tokenizer
from tests.server import small_tokenizers

CONFIG = {"eos_token": "<|im_end|>"}
SIZE = small_tokenizers.sentence_piece().get_vocab_size()  # the smaller one's


def byte_level(**options) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(small_tokenizers.byte_level().to_str())
    backend.post_processor = processors.ByteLevel(**options)
    return Tokenizer(backend, CONFIG)


TOKENIZERS = {
    "byte-level": byte_level(trim_offsets=False),
    "byte-level, trimmed": byte_level(trim_offsets=True),
    "sentencepiece": Tokenizer(small_tokenizers.sentence_piece(), CONFIG),
}
each = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
texts = st.one_of(st.text("ab  🚀é界\n", max_size=30), st.sampled_from(small_tokenizers.CORPUS))


def begins(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The character that the first byte of each token is part of, in the text of all bytes."""
    pieces = [tokenizer.token_bytes(i) * (not tokenizer.is_special(i)) for i in ids]
    spelled = b"".join(pieces)
    characters: list[int] = []  # of each byte
    while rest := spelled[len(characters) :]:
        try:
            size = len(rest.decode()[0].encode())
        except UnicodeDecodeError as error:
            size = len(rest[: error.start].decode()[:1].encode()) or error.end
        characters += [characters[-1] + 1 if characters else 0] * size
    starts = [len(b"".join(pieces[:i])) for i in range(len(pieces))]
    return [[*characters, len(spelled.decode(errors="replace"))][start] for start in starts]


@each
@given(data=st.data())
def test_tokens_of_an_answer_begin_where_their_first_byte_is(tokenizer, data):
    ordinary = st.integers(0, SIZE - 1).filter(lambda i: not tokenizer.is_special(i))
    ids = data.draw(st.lists(ordinary, max_size=30))
    offsets = Offsets(tokenizer)
    assert [offsets.advance(i) for i in ids] == begins(tokenizer, ids)


@each
@given(text=texts)
def test_tokens_of_a_prompt_begin_where_their_first_byte_is(tokenizer, text):
    ids = tokenizer.encode(text)
    cut = int(tokenizer.strips_first_space and text != "")
    expected = [max(begin - cut, 0) for begin in begins(tokenizer, ids)]
    assert Echo.of(text, ids, tokenizer, True) == (text, expected)


def test_what_follows_an_unfinished_character_begins_after_it():
    tokenizer = TOKENIZERS["sentencepiece"]
    rocket = tokenizer.encode("🚀", add_special_tokens=False)[1:]
    ids = [*rocket[:2], *tokenizer.encode("a", add_special_tokens=False), *rocket[:3]]
    offsets = Offsets(tokenizer)
    assert tokenizer.decode(ids) == "\ufffd a\ufffd"
    assert [offsets.advance(i) for i in ids] == [0, 0, 1, 3, 3, 3]
    assert offsets.advance(tokenizer.eos_token_id) == 4


def test_the_space_before_a_sentencepiece_prompt_is_not_of_the_text():
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.encode("to en")
    assert [tokenizer.token_bytes(i) for i in ids] == [b"<s>", b" to", b" ", b"en"]
    for prompt in ("to en", ids):
        assert Echo.of(prompt, ids, tokenizer, True) == ("to en", [0, 0, 2, 3])
    assert Echo.of("to en", ids, tokenizer, False) == ("to en", [])


@each
def test_an_echoed_mark_is_where_the_prompt_has_it(tokenizer):
    text = "a<|im_start|>to<|im_end|>"
    ids = tokenizer.encode(text)
    echo = Echo.of(text, ids, tokenizer, True)
    marks = [echo.offsets[i] for i, token_id in enumerate(ids) if tokenizer.is_special(token_id)]
    assert marks[-2:] == [1, 15]
    assert Echo.of(ids, ids, tokenizer, True).text.replace(" ", "") == "ato"


@each
def test_an_answer_begins_where_its_prompt_ends(tokenizer):
    echo = Echo.of("größer", tokenizer.encode("größer"), tokenizer, True)
    offsets = Offsets(tokenizer, echo)
    assert [offsets.advance(0) for _ in echo.offsets] == echo.offsets
    assert offsets.advance(tokenizer.encode("a", add_special_tokens=False)[-1]) == 6


def test_a_beginning_that_the_config_adds_is_at_the_beginning():
    backend = tokenizers.Tokenizer.from_str(small_tokenizers.byte_level().to_str())
    tokenizer = Tokenizer(backend, {"bos_token": "<s>", "add_bos_token": True})
    ids = tokenizer.encode("ab")
    assert Echo.of("ab", ids, tokenizer, True).offsets == [0, 0, 1]
