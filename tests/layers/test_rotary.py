"""Rotary tables against transformers' frequencies, for every scaling."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minisgl.layers.rotary import LinearScaling, Llama3Scaling, Rope, YarnScaling

POSITIONS = 3000

CASES: list[tuple[dict[str, Any], Rope]] = [
    ({"rope_type": "default", "rope_theta": 1e6}, Rope(1e6, 96)),
    ({"rope_type": "linear", "factor": 2.5}, Rope(1e4, 96, LinearScaling(2.5))),
    (
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 512,
        },
        Rope(1e4, 96, Llama3Scaling(8.0, 1.0, 4.0, 512)),
    ),
    (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "attention_factor": 1.25,
        },
        Rope(1e4, 96, YarnScaling(4.0, 512, 1.25, 20.0, 2.0)),
    ),
    (
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 512,
            "attention_factor": 1.0,
            "truncate": False,
        },
        Rope(1e4, 96, YarnScaling(4.0, 512, 1.0, truncate=False)),
    ),
]


@pytest.mark.parametrize(("parameters", "rope"), CASES)
def test_table_is_that_of_transformers(parameters: dict[str, Any], rope: Rope) -> None:
    config = LlamaConfig(
        head_dim=96,
        max_position_embeddings=2048,
        rope_parameters={"rope_theta": 1e4, **parameters},
    )
    positions = torch.arange(POSITIONS)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    table = rope.table(POSITIONS, torch.device("cpu"))
    expected = torch.cat((cos[0, :, :48], sin[0, :, :48]), dim=1)
    # Their angles are products in fp32: wrong by half an ulp of the angle.
    assert (table - expected).abs().max() < 1.25 * POSITIONS * torch.finfo(torch.float32).eps


def test_partial_table() -> None:
    table = Rope(1e4, 32).table(5, torch.device("cpu"))
    assert table.shape == (5, 32)
    assert torch.equal(table[0], torch.cat((torch.ones(16), torch.zeros(16))))
