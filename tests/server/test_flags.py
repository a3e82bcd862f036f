"""Flags: one for each field of the config, hints for those that are unknown."""

import re
from dataclasses import fields

import pytest

from minisgl.config import EngineConfig, ServerConfig
from minisgl.flags import ALWAYS, ELSEWHERE, OTHER_NAMES, flags_parser, read_flags


def parse(*args):
    config, others = read_flags(flags_parser(ServerConfig, "serve", ""), ServerConfig, args)
    assert others == {}
    return config


def test_no_flags_give_the_defaults():
    assert parse() == ServerConfig()


# A value other than the default for every field that is no switch.
VALUES = {
    "model": "x",
    "chat_template": "x",
    "dtype": "float32",
    "device": "cpu",
    "cpu_level": "portable",
    "load_format": "dummy",
    "tp_size": 4,
    "dist_init_addr": "a:1",
    "page_size": 32,
    "schedule_policy": "lpm",
    "batch_policy": "decode-first",
    "attention_backend": "triton",
    "sampling_defaults": "openai",
    "speculative_algorithm": "ngram",
    "speculative_draft_model": "x",
    "speculative_ngram_min": 3,
    "log_level": "warning",
    "quantization": "int8",
    "quantization_head": "int4",
    "quantization_group": 128,
    "quantized_activations": "none",
    "profile_dir": "profiles-here",
    "tool_call_parser": "hermes",
    "reasoning_parser": "none",
    "host": "::1",
    "served_model_name": "x",
}


# What a field cannot be given without.
WITH = {
    "quantization_group": ("--quantization=int4",),
    "nnodes": ("--tp-size=7", "--dist-init-addr=a:1"),
    "node_rank": ("--tp-size=8", "--nnodes=8", "--dist-init-addr=a:1"),
    "dist_init_addr": ("--tp-size=2", "--nnodes=2"),
    "speculative_draft_model": ("--speculative-algorithm=draft",),
    "speculative_num_draft_tokens": ("--speculative-algorithm=ngram",),
    "speculative_ngram_min": ("--speculative-algorithm=ngram",),
    "speculative_ngram_max": ("--speculative-algorithm=ngram",),
}


@pytest.mark.parametrize("item", fields(ServerConfig), ids=lambda item: item.name)
def test_every_field_has_a_flag(item):
    flag = "--" + item.name.replace("_", "-")
    if item.type is bool:
        assert getattr(parse(flag), item.name) is True
        return
    value = VALUES.get(item.name, 0.5 if "float" in str(item.type) else 7)
    others = WITH.get(item.name, ())
    assert getattr(parse(flag, str(value), *others), item.name) == value
    assert getattr(parse(f"{flag}={value}", *others), item.name) == value


def test_aliases():
    assert parse("--model-path", "a").model == parse("--model", "a").model == "a"
    assert parse("--tp", "1").tp_size == parse("--tp-size", "1").tp_size == 1


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--prot", "1"], "unknown argument --prot; did you mean --port?"),
        (["--max-total-token=5"], "did you mean --max-total-tokens?"),
        (["--port", "x"], "--port: invalid int value: 'x'"),
        (["--port", "70000"], "--port must be at most 65535, got 70000"),
        (["--page-size", "7"], "--page-size must be one of [1, 16, 32, 64], got 7"),
        (["--dtype", "int4"], "invalid choice: 'int4'"),
        (["--disable-radix-cache=1"], "ignored explicit argument '1'"),
        (["stray"], "unknown argument stray"),
        (["--max-model-len", "9"], "--max-model-len; did you mean --context-length? (--help"),
        (["--max_model_len=9"], "--max_model_len=9; did you mean --context-length? (--help"),
        (["--tensor-parallel-size", "2"], "; did you mean --tp-size? (--help"),
        (["-tp", "2"], "unknown argument -tp; did you mean --tp-size? (--help"),
        (["--enable-prefix-caching"], "; prefixes are always cached, without --disable-radix"),
        (["--api-key", "k"], "--api-key; no key is asked for: a proxy before the server can"),
        (["--generation-config", "vllm"], "; did you mean --sampling-defaults? (--help"),
        (["--kv-cache-dtype", "fp8"], "unknown argument --kv-cache-dtype (--help"),
        (["--max-lora-rank", "8"], "unknown argument --max-lora-rank (--help"),
        (["--max-seq-len", "8"], "unknown argument --max-seq-len (--help"),
    ],
)
def test_a_wrong_flag_is_named(capsys, args, words):
    with pytest.raises(SystemExit) as caught:
        parse(*args)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    for item in fields(ServerConfig):
        assert "--" + item.name.replace("_", "-") in text
    assert "(default: 30000)" in text


def test_names_of_other_engines_are_not_ours_and_lead_to_flags_that_exist(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    ours = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", capsys.readouterr().out))
    assert "--tp" in ours
    assert set(ELSEWHERE) <= ours
    assert not ours & (set(OTHER_NAMES) | set(ALWAYS))
    assert len(OTHER_NAMES) == sum(len(names.split()) for names in ELSEWHERE.values())  # each once
    for text in ALWAYS.values():
        assert set(re.findall(r"--[a-z-]+", text)) <= ours
    for other, (twin,) in OTHER_NAMES.items():
        with pytest.raises(SystemExit):
            parse(other, "1")
        assert f"unknown argument {other}; did you mean {twin}?" in capsys.readouterr().err


def test_a_hint_names_a_flag_of_the_same_program(capsys):
    with pytest.raises(SystemExit):
        flags_parser(EngineConfig, "chat", "").parse_args(["--alias", "x"])
    assert "did you mean" not in capsys.readouterr().err
