"""Tokens -> text: streamed equals whole byte for byte, and whole equals the tokenizer's own."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minisgl.core.request import Delta, SamplingParams, TokenLogprobs
from minisgl.server.text import StopMatcher, TextStream
from minisgl.server.tokenizer import Tokenizer
from tests.server import small_tokenizers

CONFIG = {"eos_token": "<|im_end|>"}
BYTES = Tokenizer(small_tokenizers.byte_level(), CONFIG)
PIECES = Tokenizer(small_tokenizers.sentence_piece(), CONFIG)
BOTH = pytest.mark.parametrize("tokenizer", [BYTES, PIECES], ids=["byte-level", "sentencepiece"])

texts = st.one_of(
    st.text(max_size=40),
    st.text("ab 🚀é界\n", max_size=30),
    st.sampled_from(small_tokenizers.CORPUS),
)
SIZE = min(
    small_tokenizers.byte_level().get_vocab_size(),
    small_tokenizers.sentence_piece().get_vocab_size(),
)
token_ids = st.lists(st.integers(0, SIZE - 1), max_size=40)


def split(ids: list[int], cuts: list[int]) -> list[list[int]]:
    """`ids` in consecutive runs of the lengths `cuts`, the last run taking the rest."""
    runs, start = [], 0
    for length in cuts:
        runs.append(ids[start : start + length])
        start += length
    return [*runs, ids[start:]]


def stream(tokenizer: Tokenizer, params: SamplingParams, runs: list[list[int]]) -> TextStream:
    """Feeds the runs as deltas, the last one ending with `length`; keeps the pieces."""
    text = TextStream(tokenizer, params)
    text.pieces = [
        text.feed(Delta("r", 0, run, "length" if i == len(runs) - 1 else None))
        for i, run in enumerate(runs)
    ]
    return text


def joined(text: TextStream) -> str:
    return "".join(piece.text for piece in text.pieces)


# ---- whole texts, against the tokenizers library ------------------------------------------------


@given(texts)
def test_byte_level_text_survives_the_round_trip(text):
    ids = BYTES.encode(text)
    own = small_tokenizers.byte_level().decode(ids, skip_special_tokens=True)
    assert BYTES.decode(ids) == own == text


@given(token_ids)
def test_byte_level_decoding_of_any_ids_equals_the_library(ids):
    assert BYTES.decode(ids) == small_tokenizers.byte_level().decode(ids)
    assert BYTES.decode(ids, skip_special_tokens=False) == small_tokenizers.byte_level().decode(
        ids, skip_special_tokens=False
    )


@given(texts)
def test_sentencepiece_text_keeps_its_first_space(text):
    ids = PIECES.encode(text)
    own = small_tokenizers.sentence_piece().decode(ids, skip_special_tokens=True)
    assert PIECES.decode(ids).removeprefix(" ") == own


def test_a_sentencepiece_word_after_a_prompt_keeps_its_space():
    prompt, whole = PIECES.encode("give each"), PIECES.encode("give each running")
    assert PIECES.decode(whole[len(prompt) :]) == " running"


def test_special_tokens_are_skipped_and_added_ones_are_not():
    ids = BYTES.encode("<|im_start|>a <think>b two words<|im_end|>")
    assert BYTES.decode(ids) == "a <think>b two words"
    assert BYTES.decode(ids, skip_special_tokens=False).endswith("two words<|im_end|>")


def test_an_id_beyond_the_vocabulary_gives_no_text():
    assert BYTES.decode([*BYTES.encode("ab"), 10_000]) == "ab"


# ---- streams ------------------------------------------------------------------------------------


@BOTH
@given(data=st.data())
def test_streamed_text_equals_the_whole_for_any_tokens_and_split(tokenizer, data):
    ids = data.draw(st.one_of(token_ids, texts.map(tokenizer.encode)))
    runs = split(ids, data.draw(st.lists(st.integers(0, 5), max_size=20)))
    text = stream(tokenizer, SamplingParams(), runs)
    assert joined(text) == tokenizer.decode(ids)
    assert text.num_tokens == len(ids)
    assert text.finish_reason == "length"


@BOTH
@given(data=st.data())
def test_no_piece_ends_inside_a_character(tokenizer, data):
    text = data.draw(st.text("é界🚀x", min_size=1, max_size=12))
    ids = tokenizer.encode(text, add_special_tokens=False)
    shown = stream(tokenizer, SamplingParams(), [[i] for i in ids])
    assert "\ufffd" not in joined(shown)
    assert joined(shown).removeprefix(" ") == text.removeprefix(" ")


def earliest_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Reads one character at a time: the text before the first stop string to be complete."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if stop and text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


small_stops = st.lists(st.text("ab界", min_size=1, max_size=4), min_size=1, max_size=4)


@given(text=st.text("ab界", max_size=40), stops=small_stops, data=st.data())
@example(text="aab", stops=["ab"], data=None)
@example(text="aabaac", stops=["aabaad", "aac"], data=None)
def test_stop_strings_across_any_borders(text, stops, data):
    if data is None:
        cuts = [1] * len(text)
    else:
        cuts = data.draw(st.lists(st.integers(0, 4), max_size=40))
    matcher = StopMatcher(stops)
    shown = "".join(matcher.push(piece) for piece in split(text, cuts))
    if matcher.matched is None:
        shown += matcher.flush()
    assert (shown, matcher.matched) == earliest_stop(text, stops)


@given(text=st.text("ab", max_size=30), stops=small_stops)
def test_only_possible_beginnings_of_stops_are_held_back(text, stops):
    matcher = StopMatcher(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        shown += matcher.push(character)
        if matcher.matched is not None:
            return
        held = text[len(shown) : end]
        assert held == "" or any(stop.startswith(held) for stop in stops)


@BOTH
@given(data=st.data())
def test_a_stop_string_ends_the_stream_alike_however_tokens_arrive(tokenizer, data):
    source = data.draw(st.text("ab 界🚀", min_size=1, max_size=30))
    ids = tokenizer.encode(source, add_special_tokens=False)
    params = SamplingParams(stop=tuple(data.draw(small_stops)))
    runs = split(ids, data.draw(st.lists(st.integers(0, 4), max_size=20)))
    text, whole = stream(tokenizer, params, runs), stream(tokenizer, params, [ids])
    expected, stop = earliest_stop(tokenizer.decode(ids), list(params.stop))
    assert joined(text) == joined(whole) == expected
    assert text.stop_string == whole.stop_string == stop
    assert text.num_tokens == whole.num_tokens == sum(len(p.token_ids) for p in text.pieces)
    assert text.finish_reason == ("stop" if stop else "length")
    if stop:  # no fewer tokens would have completed it
        assert stop not in tokenizer.decode(ids[: text.num_tokens - 1])


def test_tokens_after_the_stop_string_are_not_counted():
    ids = BYTES.encode("one. two. three")
    text = TextStream(BYTES, SamplingParams(stop=". t"))
    logprobs = [TokenLogprobs(i, -1.0, [], []) for i in ids]
    piece = text.feed(Delta("r", 0, ids, logprobs=logprobs))
    assert (piece.text, piece.finish_reason) == ("one", "stop")
    assert BYTES.decode(piece.token_ids).startswith("one. t")
    assert len(piece.logprobs) == len(piece.token_ids) == text.num_tokens
    late = text.feed(Delta("r", 0, ids, "length"))
    assert (late.text, late.token_ids, late.finish_reason) == ("", [], None)


def test_the_token_that_ended_the_choice_is_counted_but_gives_no_text():
    ids = BYTES.encode("abc")
    text = TextStream(BYTES, SamplingParams())
    piece = text.feed(Delta("r", 0, ids, "stop", stop_token_id=ids[-1]))
    assert piece.text == BYTES.decode(ids[:-1])
    assert piece.token_ids == ids
    assert piece.finish_reason == "stop"


def test_a_stop_token_met_earlier_is_ordinary_text():
    """Below `min_tokens` the engine runs past its stop tokens; only the last one ends."""
    token = BYTES.encode("a")[0]
    text = TextStream(BYTES, SamplingParams(stop_token_ids=(token,), min_tokens=2))
    pieces = [
        text.feed(Delta("r", 0, [token])),
        text.feed(Delta("r", 0, [token], "stop", stop_token_id=token)),
    ]
    assert [piece.text for piece in pieces] == ["a", ""]


def test_stop_strings_wait_for_min_tokens():
    ids = [token for letter in "axbxc" for token in BYTES.encode(letter)]
    text = stream(BYTES, SamplingParams(stop="x", min_tokens=3), [[i] for i in ids])
    assert joined(text) == "axb"
    assert text.num_tokens == 4


def test_held_back_text_comes_at_the_end():
    ids = BYTES.encode("wait for it")
    text = stream(BYTES, SamplingParams(stop="it is"), [[i] for i in ids])
    assert joined(text) == "wait for it"
    assert text.pieces[-1].text.endswith("it")


def test_an_unfinished_character_is_replaced_at_the_end():
    ids = BYTES.encode("a🚀")[:-1]
    text = stream(BYTES, SamplingParams(), [[i] for i in ids])
    assert joined(text) == BYTES.decode(ids) == "a\ufffd"
