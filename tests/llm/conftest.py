"""A model directory made on the spot: random weights, a real tokenizer and chat template."""

import json
from pathlib import Path

import pytest

from tests.server.small_tokenizers import byte_level, save

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 350,  # padded beyond the tokenizer's 342, as models do
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "eos_token_id": 3,
    "bos_token_id": 0,
}


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save(tmp_path_factory.mktemp("model"), byte_level())
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory
