"""Keys of a GGUF file's architecture: those that change what is computed are read or refused."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from minisgl.gguf.config import read_config
from minisgl.gguf.header import Gguf, read_gguf
from minisgl.models.config import ModelConfig
from tests.world.gguf_files import make_gguf


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Gguf]:
    folder = tmp_path_factory.mktemp("gguf")
    cases = {"llama": "llama2", "qwen3moe": "qwen3-moe", "gemma2": "gemma2", "gemma3": "gemma3"}
    for arch, name in cases.items():
        make_gguf(name, folder / f"{arch}.gguf")
    return {arch: read_gguf(folder / f"{arch}.gguf") for arch in cases}


def read(file: Gguf, **changed: Any) -> ModelConfig:
    """The config of a file with other values, None for none; "__" stands for "."."""
    arch = file.metadata["general.architecture"]
    other = {f"{arch}.{key.replace('__', '.')}": value for key, value in changed.items()}
    merged = {k: v for k, v in {**file.metadata, **other}.items() if v is not None}
    return ModelConfig.from_dict(read_config(replace(file, metadata=merged))[0])


@pytest.mark.parametrize(
    ("arch", "key", "value"),
    [
        ("llama", "rope__scaling__attn_factor", 2.0),
        ("llama", "rope__scaling__yarn_log_multiplier", 0.5),
        ("llama", "rope__freq_base_swa", 100.0),
        ("llama", "attention__scale", 0.5),
        ("llama", "attention__sliding_window", 16),
        ("llama", "logit_scale", 0.5),
        ("llama", "final_logit_softcapping", 30.0),
        ("llama", "expert_count", 4),
        ("llama", "foo", np.arange(99)),
        ("qwen3moe", "expert_weights_scale", 2.0),
        ("qwen3moe", "expert_gating_func", 2),
        ("gemma2", "attention__sliding_window_pattern", 3),
        ("gemma3", "attn_logit_softcapping", 30.0),
    ],
)
def test_what_is_not_read_is_refused(files, arch: str, key: str, value: Any) -> None:
    name = key.replace("__", r"\.")
    shown = r"\[0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\]" if key == "foo" else value
    with pytest.raises(ValueError, match=rf"{arch}\.{name} is not read for {arch}, got {shown}$"):
        read(files[arch], **{key: value})


def test_what_asks_for_nothing_is_read(files) -> None:
    plain = read(files["llama"])
    nothing = {"expert_count": 0, "expert_used_count": 0, "rope__scaling__finetuned": True}
    assert read(files["llama"], **nothing, rope__scale_linear=1.0) == plain


def test_linear_scaling_in_every_spelling(files) -> None:
    plain = read(files["llama"])
    wanted = read(files["llama"], rope__scaling__type="linear", rope__scaling__factor=4.0)
    assert wanted != plain
    assert read(files["llama"], rope__scale_linear=4.0) == wanted
    assert read(files["llama"], rope__scaling__factor=4.0) == wanted  # as llama.cpp has it
    off = {"rope__scaling__type": "none", "rope__scaling__factor": 4.0}
    assert read(files["llama"], **off) == plain


def test_what_own_keys_say(files) -> None:
    windows = [layer.window is None for layer in read(files["gemma3"]).layers]
    assert windows == [False] * 5 + [True, False]
    other = read(files["gemma3"], attention__sliding_window_pattern=3)
    assert [layer.window is None for layer in other.layers] == [False, False, True] * 2 + [False]
    moe = read(files["qwen3moe"], expert_weights_norm=False).layers[0].moe
    assert moe is not None
    assert not moe.renormalize


@pytest.mark.parametrize(("arch", "layers"), [("llama", 3), ("gemma2", 46), ("gemma3", 62)])
@pytest.mark.parametrize("key", ["embedding_length", "block_count", "attention__head_count"])
def test_what_is_missing_is_named(files, arch: str, layers: int, key: str) -> None:
    message = rf"{arch}\.{key.replace('__', '.')} must be an integer of 1 to \d+, got "
    for value in (None, 0):
        with pytest.raises(ValueError, match=f"{message}{value}$"):
            read(files[arch], **{"block_count": layers, key: value})


@pytest.mark.parametrize(
    "key", ["rope__freq_base", "rope__scaling__factor", "rope__scale_linear", "attention__causal"]
)
def test_an_array_for_one_value_is_shown_as_a_list(files, key: str) -> None:
    name = key.replace("__", r"\.")
    with pytest.raises(ValueError, match=rf"llama\.{name} must be one value, got \[1\.0, 2\.0\]$"):
        read(files["llama"], **{key: np.array([1.0, 2.0], np.float32)})
