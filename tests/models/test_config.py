"""config.json in both spellings; every wrong field refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from minisgl.layers.rotary import LinearScaling, Llama3Scaling, YarnScaling
from minisgl.models.config import ModelConfig
from minisgl.models.presets import PRESETS

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}

QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "num_key_value_heads": 4}


def read(**fields: Any) -> ModelConfig:
    return ModelConfig.from_dict({**LLAMA, **fields})


def test_fields_that_old_checkpoints_leave_out() -> None:
    config = read()
    assert (config.num_kv_heads, config.head_dim, config.num_layers) == (4, 16, 2)
    assert config.layers[0].rope.theta == 10_000
    assert config.attention_scale == 16**-0.5
    assert config.dtype is torch.float32
    assert not config.tied_embeddings
    assert config.eos_token_ids == ()


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_dtype(spelling: str) -> None:
    assert read(**{spelling: "bfloat16"}).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "linear", "factor": 4.0}, LinearScaling(4.0)),
        ({"rope_type": "default"}, None),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
            Llama3Scaling(8.0, 1.0, 4.0, 64),
        ),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            YarnScaling(4.0, 64, 0.1 * math.log(4) + 1),
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "mscale": 2.0, "mscale_all_dim": 1.0},
            YarnScaling(4.0, 128, (0.2 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
        ),
    ],
)
def test_rope_in_both_spellings(scaling: dict[str, Any], expected: Any) -> None:
    old = read(rope_theta=5000.0, rope_scaling=scaling)
    new = read(rope_parameters={"rope_theta": 5000.0, **scaling})
    assert old == new
    assert old.layers[0].rope.theta == 5000.0
    assert old.layers[0].rope.scaling == expected


def test_yarn_extends_the_context_unless_it_is_stated() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert read(rope_scaling=yarn).max_context == 512
    assert read(rope_scaling=yarn, max_position_embeddings=1024).max_context == 1024


def test_end_of_sequence_ids() -> None:
    fields = {**LLAMA, "eos_token_id": 5}
    assert ModelConfig.from_dict(fields).eos_token_ids == (5,)
    assert ModelConfig.from_dict(fields, {"eos_token_id": [7, 9]}).eos_token_ids == (7, 9)
    assert ModelConfig.from_dict(fields, {"bos_token_id": 1}).eos_token_ids == (5,)


def test_windows_by_family() -> None:
    def windows(architecture: str, **fields: Any) -> list[int | None]:
        sizes = {"num_hidden_layers": 6, "num_key_value_heads": 4}
        config = read(architectures=[architecture], **sizes, **fields)
        return [layer.window for layer in config.layers]

    assert windows("MistralForCausalLM", sliding_window=9) == [9] * 6
    assert windows("MistralForCausalLM", sliding_window=None) == [None] * 6
    qwen = {"sliding_window": 9, "max_window_layers": 4}
    assert windows("Qwen2ForCausalLM", use_sliding_window=False, **qwen) == [None] * 6
    assert windows("Qwen2ForCausalLM", use_sliding_window=True, **qwen) == [None] * 4 + [9] * 2
    assert windows("Gemma2ForCausalLM", sliding_window=9) == [9, None] * 3
    assert windows("Gemma3ForCausalLM", sliding_window=9) == [9] * 5 + [None]
    assert (
        windows("Gemma3ForCausalLM", sliding_window=9, sliding_window_pattern=3)
        == [
            9,
            9,
            None,
        ]
        * 2
    )
    types = ["full_attention", "sliding_attention"] * 3
    assert windows("Gemma3ForCausalLM", sliding_window=9, layer_types=types) == [None, 9] * 3


def test_gemma3_nested_and_by_layer_kind() -> None:
    """The multimodal checkpoint nests its decoder and leaves most fields out."""
    nested = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "torch_dtype": "bfloat16",
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 11},
    }
    config = ModelConfig.from_dict(nested)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.tied_embeddings
    assert config.eos_token_ids == (1, 106)
    assert config.layers[0].rope.theta == 10_000
    assert config.layers[0].rope.scaling is None
    assert config.layers[5].rope.theta == 1_000_000
    assert config.layers[5].rope.scaling == LinearScaling(8.0)


def test_experts() -> None:
    fields = {"architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 32}
    experts = {"num_experts": 8, "num_experts_per_tok": 2}
    config = read(**fields, **experts, num_hidden_layers=4, decoder_sparse_step=2)
    assert [layer.moe is not None for layer in config.layers] == [False, True, False, True]
    respelled = read(**fields, num_local_experts=8, num_experts_per_tok=2)
    assert respelled.layers[0].moe is not None
    assert respelled.layers[0].moe.num_experts == 8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"architectures": []}, "architectures"),
        ({"hidden_size": "64"}, "hidden_size must be an integer of at least 1, got '64'"),
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"torch_dtype": "float8"}, "dtype"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({**QWEN2, "layer_types": ["full_attention"]}, "layer_types"),
        ({**QWEN2, "layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ({**QWEN2, "layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(**fields)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no model: .* a config\.json"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert ModelConfig.from_hf(tmp_path).eos_token_ids == (3, 4)
    lacking = {name: value for name, value in LLAMA.items() if name != "hidden_size"}
    (tmp_path / "config.json").write_text(json.dumps(lacking))
    with pytest.raises(ValueError, match="'hidden_size'"):
        ModelConfig.from_hf(tmp_path)


def test_a_yarn_that_no_layer_uses_is_read_all_the_same():
    """It says how long the context is."""
    config = PRESETS["qwen3-0.6b"] | {"use_sliding_window": True, "sliding_window": 8}
    config |= {"layer_types": ["sliding_attention"] * config["num_hidden_layers"]}
    yarn = {"rope_type": "yarn", "rope_theta": 1e6}
    with pytest.raises(ValueError, match="rope parameters has no field 'factor'"):
        ModelConfig.from_dict(config | {"rope_parameters": yarn})
