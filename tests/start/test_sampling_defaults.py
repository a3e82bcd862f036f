"""What a model recommends for requests that say nothing, read from generation_config.json."""

import json
import logging

import pytest

from minisgl.config import EngineConfig
from minisgl.core.request import NEUTRAL
from minisgl.start.sampling import read_sampling_defaults

QWEN3 = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 5}


def read(folder, content, **options) -> dict[str, float]:
    (folder / "generation_config.json").write_text(json.dumps(content))
    return read_sampling_defaults(EngineConfig(**options), folder)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, {}),
        (QWEN3, {"temperature": 0.6, "top_k": 20, "top_p": 0.95}),
        ({"min_p": 0.1, "repetition_penalty": 1.05}, {"min_p": 0.1, "repetition_penalty": 1.05}),
        ({"top_k": -1, "top_p": None, "temperature": 1e-9}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ({"do_sample": None, "temperature": 0.6}, {"temperature": 0.6}),
        ({"max_new_tokens": 7, "num_beams": 4, "presence_penalty": 1.5}, {}),
    ],
)
def test_what_is_read(tmp_path, content, expected):
    assert read(tmp_path, content) == NEUTRAL | expected


def test_a_model_known_by_name_has_its_makers_where_its_file_says_nothing(tmp_path):
    config, card = EngineConfig(model="smollm2"), {"temperature": 0.2, "top_p": 0.9}
    assert read_sampling_defaults(config, tmp_path) == NEUTRAL | card
    assert read(tmp_path, {"top_k": 7}, model="smollm2") == NEUTRAL | {"top_k": 7}
    assert read(tmp_path, {}, model="smollm2", sampling_defaults="openai") == NEUTRAL


def test_openais_defaults_on_demand_and_without_a_file(tmp_path):
    assert read_sampling_defaults(EngineConfig(), tmp_path) == NEUTRAL
    wrong = {"temperature": "hot", "do_sample": False}
    assert read(tmp_path, wrong, sampling_defaults="openai") == NEUTRAL


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperature": -1}, r"temperature must be at least 0.0 and at most 100.0, got -1; "),
        ({"do_sample": False, "top_p": 1.5}, r"top_p must be greater than 0.0 .*, got 1.5; "),
        ({"top_k": 50.0}, r"top_k must be an int, got 50.0; .*sampling_defaults openai"),
        ({"repetition_penalty": "1"}, r"repetition_penalty must be a number, got '1'; "),
        ({"do_sample": 0}, r"do_sample must be true or false, got 0"),
    ],
)
def test_a_wrong_value_is_named_with_its_file(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"/generation_config\.json: {message}"):
        read(tmp_path, content)


def test_one_line_of_the_log_says_what_holds(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "minisgl"):
        read(tmp_path, QWEN3)
        read(tmp_path, QWEN3, sampling_defaults="openai")
    model, openai = (record.getMessage() for record in caplog.records)
    assert model == (
        "where a request says nothing: temperature 0.6, top_k 20, top_p 0.95, min_p 0, "
        f"repetition_penalty 1 ({tmp_path}/generation_config.json)"
    )
    assert openai.endswith("top_p 1, min_p 0, repetition_penalty 1 (OpenAI's)")
