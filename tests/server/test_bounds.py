"""How much one body may hold and ask for: values, choices, log-probabilities."""

import dataclasses
import json

import pytest

from minisgl.core.executor import Limits
from minisgl.server.body import MAX_COMMAS, MAX_CONTAINERS, MAX_SHOWN, ApiError, decode, shown
from minisgl.server.completions import parse_completion
from tests.server.fake_engine import VOCAB, served_model

MODEL = served_model()


def test_a_body_of_too_many_values_is_refused_before_it_is_parsed():
    for content, message in (
        (b"1," * (MAX_COMMAS + 1), rf"{MAX_COMMAS} commas between values, got {MAX_COMMAS + 1}"),
        (b"[]," * MAX_CONTAINERS, rf"at most {MAX_CONTAINERS} arrays and objects, got"),
    ):
        with pytest.raises(ApiError, match=message):
            parse_completion(b'{"prompt": [' + content + b"1]}", MODEL)


def test_what_stands_in_strings_is_no_value():
    text = '[{,"\\' * (MAX_COMMAS // 2) + '\\"'
    assert decode(json.dumps({"a": text, "b": [1, 2]}).encode()) == {"a": text, "b": [1, 2]}


def test_a_long_value_is_not_written_out_to_be_cut():
    written = []

    class Watched(list):
        def __iter__(self):
            for item in super().__iter__():
                written.append(item)
                yield item

    assert shown(Watched(range(10**5))) == str([*range(10**5)])[:MAX_SHOWN] + "..."
    assert len(written) < MAX_SHOWN


def test_choices_are_counted_over_all_prompts_before_any_is_encoded():
    content = json.dumps({"prompt": ["a"] * 1024, "n": 128}).encode()
    with pytest.raises(ApiError, match="at most 1024 choices of all prompts, got 131072") as caught:
        parse_completion(content, MODEL)
    assert caught.value.body["error"]["param"] == "n"
    for prompts, n in ((1024, 1), (8, 128)):
        content = json.dumps({"prompt": ["a"] * prompts, "n": n}).encode()
        assert len(parse_completion(content, MODEL).requests) == prompts


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompts", "length", "logprobs", "found"),
    [
        (64, 2047, 5, None),  # batches as evaluation harnesses send them
        (256, 2047, 1, None),
        (64, 2047, 20, 25 * 2047 * 21),  # those of the first 25 prompts are too many
        (1, 60_000, 20, 60_000 * 21),
    ],
)
def test_log_probabilities_of_echoed_prompts_are_bounded(prompts, length, logprobs, found, stream):
    limits = Limits(num_pages=2**16, page_size=1, max_rows=8, max_context=2**16, vocab_size=VOCAB)
    model = dataclasses.replace(MODEL, limits=limits)
    fields = {"prompt": [[5] * length] * prompts, "logprobs": logprobs, "echo": True}
    content = json.dumps(fields | {"max_tokens": 1, "stream": stream}).encode()
    if found is None:
        assert len(parse_completion(content, model).requests) == prompts
        return
    with pytest.raises(
        ApiError, match=f"logprobs must ask for at most {2**20} .*got at least {found}"
    ):
        parse_completion(content, model)
