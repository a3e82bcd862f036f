"""Fields in the wild against transformers: what its code reads for a family, ours reads likewise.

A checkpoint's config.json is given odd fields; both load it and must give the same logits.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from minisgl.layers.weights import Placement
from minisgl.models.config import ModelConfig
from minisgl.models.families import FAMILIES as FAMILY_ROWS
from minisgl.models.loader import load_model
from tests.models.driver import Paged
from tests.world.checkpoints import LINEAR, LLAMA3, YARN, make

PROMPT = torch.randint(3, 211, (70,), generator=torch.Generator().manual_seed(3)).tolist()
SCALINGS = {"yarn": YARN, "linear": LINEAR, "llama3": LLAMA3}
FAMILIES = {
    "llama": "llama2",
    "mistral": "mistral-window",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "moe": "qwen3-moe",
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "multimodal": "gemma3-multimodal",
}
HALF_SLIDING = ["full_attention", "sliding_attention", "full_attention"]
WITHOUT_THETA = {name: value for name, value in YARN.items() if name != "rope_theta"}


def edit(folder: Path, fields: dict[str, Any], dropped: tuple[str, ...] = ()) -> None:
    """Write fields into config.json's decoder, where a model of several modalities nests it."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    decoder = config.get("text_config", config)
    decoder.update(fields)
    for name in dropped:
        decoder.pop(name, None)
    file.write_text(json.dumps(config))


def ours(folder: Path) -> torch.Tensor:
    config = ModelConfig.from_hf(folder)
    decoder = load_model(config, folder, Placement(torch.float32, torch.device("cpu")))
    return Paged(decoder, 1, len(PROMPT)).prefill({0: PROMPT}, chunk=len(PROMPT))[0]


def theirs(folder: Path) -> torch.Tensor:
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model = getattr(transformers, name).from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        return model.eval()(torch.tensor([PROMPT])).logits[0]


def check(folder: Path) -> torch.Tensor:
    expected = theirs(folder)
    torch.testing.assert_close(ours(folder), expected, atol=1e-4, rtol=0)
    return expected


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rope_scaling_beside_rope_parameters(family: str, scaling: str, tmp_path: Path) -> None:
    make(FAMILIES[family], tmp_path)
    before = theirs(tmp_path)
    edit(tmp_path, {"rope_scaling": SCALINGS[scaling]})
    assert (check(tmp_path) - before).abs().max() > 0.1


ROPES = {
    "the theta of rope_parameters is gone": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
        "rope_scaling": WITHOUT_THETA,
    },
    "a theta of the file": {"rope_theta": 500.0, "rope_scaling": WITHOUT_THETA},
    "a theta of the file beside rope_parameters": {"rope_theta": 500.0},
    "no theta in rope_parameters": {
        "rope_theta": 500.0,
        "rope_local_base_freq": 300.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "default"},
            "sliding_attention": {"rope_type": "default"},
        },
    },
    "the file's original context": {
        "original_max_position_embeddings": 16,
        "rope_scaling": YARN,
    },
    "the file's original context in rope_parameters": {
        "original_max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 99.0, "factor": 3.0},
    },
    "no truncation": {"rope_scaling": {**YARN, "truncate": False}},
    "the older name of the type": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "other types' fields": {"rope_scaling": {**LINEAR, "beta_fast": 4, "low_freq_factor": 2.0}},
    "half a head, unscaled": {"partial_rotary_factor": 0.5},
}


# transformers cannot load these: the first names no kind of layer, the second meets a scaling.
NOT_FOR_GEMMA3 = {"the theta of rope_parameters is gone", "half a head, unscaled"}


@pytest.mark.parametrize(
    ("family", "case"),
    [
        (family, case)
        for family in ("llama", "qwen3", "gemma2", "gemma3")
        for case in ROPES
        if family != "gemma3" or case not in NOT_FOR_GEMMA3
    ],
)
def test_rope(family: str, case: str, tmp_path: Path) -> None:
    make(FAMILIES[family], tmp_path)
    fields = ROPES[case]
    if "full_attention" in fields.get("rope_parameters", {}) and family != "gemma3":
        fields = {**fields, "rope_parameters": fields["rope_parameters"]["full_attention"]}
    edit(tmp_path, fields)
    check(tmp_path)


ODD = {
    "a window": {"sliding_window": 5},
    "a window not used": {"sliding_window": 5, "use_sliding_window": False},
    "a window used": {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1},
    "layer types": {
        "sliding_window": 5,
        "use_sliding_window": True,
        "layer_types": HALF_SLIDING,
    },
    "an attention scale": {"query_pre_attn_scalar": 3},
    "soft caps": {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.7},
    "weights of experts": {"norm_topk_prob": False},
    "biases of the feed-forward block": {"mlp_bias": False, "hidden_dropout": 0.5},
    "another activation": {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh"},
    "both spellings of the period": {"sliding_window_pattern": 3, "_sliding_window_pattern": 2},
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_field_acts_where_transformers_reads_it(family: str, case: str, tmp_path: Path) -> None:
    make(FAMILIES[family], tmp_path)
    dropped = ("layer_types",) if "period" in case or "window" in case else ()
    edit(tmp_path, ODD[case], dropped)
    check(tmp_path)


@pytest.mark.parametrize(
    ("fields", "tied"),
    [({"tie_word_embeddings": False}, False), ({"text_config": {}}, True), ({}, True)],
)
def test_a_model_of_several_modalities_is_tied_as_its_outer_config_says(
    fields: dict[str, Any], tied: bool
) -> None:
    inner = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6}
    inner["tie_word_embeddings"] = not tied
    config = {"architectures": ["Gemma3ForConditionalGeneration"], **fields, "text_config": inner}
    assert ModelConfig.from_dict(config).tied_embeddings == tied
    theirs = transformers.Gemma3Config(**{n: v for n, v in config.items() if n != "architectures"})
    assert theirs.tie_word_embeddings == tied


@pytest.mark.parametrize("architecture", FAMILY_ROWS)
def test_what_a_checkpoint_leaves_out(architecture: str) -> None:
    """The values in a family's row are those of transformers, but where it has no such field."""
    row = FAMILY_ROWS[architecture].defaults
    prefix = architecture.replace("Gemma3ForCausalLM", "Gemma3Text").split("For")[0]
    config = getattr(transformers, f"{prefix}Config")()
    text = config.get_text_config()
    text.tie_word_embeddings = config.tie_word_embeddings
    # eos_token_id: that of a published checkpoint is in its files, not in the code.
    compared = [name for name in row if hasattr(text, name) and name != "eos_token_id"]
    compared = [
        name for name in compared if not name.startswith(("rope_", "per_layer", "use_bidir"))
    ]
    assert len(compared) >= 7
    derived = {"head_dim": text.hidden_size // text.num_attention_heads, "layer_types": None}
    derived["num_key_value_heads"] = text.num_attention_heads
    derived["mlp_only_layers"] = []
    for name in compared:
        ours = derived[name] if not row[name] and name in derived else row[name]
        gated = name == "sliding_window" and row.get("use_sliding_window") is False
        if name != "layer_types" and not gated:
            assert (name, ours) == (name, getattr(text, name))


@pytest.mark.parametrize("family", ["qwen3", "multimodal"])
@pytest.mark.parametrize("head", ["of its own", "the embedding", "the embedding, moved"])
def test_a_head_stored_with_a_config_that_ties_it(
    family: str, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minisgl.models.loader.PIECE", 100)  # both are compared in parts
    make(FAMILIES[family], tmp_path)
    before, file = theirs(tmp_path), tmp_path / "model.safetensors"
    tensors = load_file(file)
    (embedding,) = (name for name in tensors if name.endswith("embed_tokens.weight"))
    name = embedding.replace("model.embed_tokens", "lm_head")
    tensors[name] = tensors[embedding].clone()
    if head == "of its own":
        tensors[name][-1] += 1.0
    elif head == "the embedding, moved":
        del tensors[embedding]
    save_file(tensors, file, metadata={"format": "pt"})
    after = check(tmp_path)
    assert torch.equal(after, before) == (head != "of its own")


REFUSED = [
    # transformers cannot compute these.
    ("gemma2", {"sliding_window": None}, "sliding_window must be an integer"),
    ("gemma3", {"sliding_window": None}, "sliding_window must be an integer"),
    ("qwen3", {"sliding_window": 5, "layer_types": HALF_SLIDING}, "use_sliding_window"),
    ("llama", {"partial_rotary_factor": 0.5, "rope_scaling": YARN}, "partial_rotary_factor"),
    ("gemma3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    # It can compute these, and this engine cannot.
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be false"),
    ("llama", {"is_causal": False}, "is_causal must be true"),
    ("qwen2", {"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config must be null"),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
]


@pytest.mark.parametrize(("family", "fields", "message"), REFUSED)
def test_refused(family: str, fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    make(FAMILIES[family], tmp_path)
    edit(tmp_path, fields)
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_unknown_fields_are_named_once_and_known_ones_not(
    family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(FAMILIES[family], tmp_path)
    with caplog.at_level("WARNING", logger="minisgl"):
        ModelConfig.from_hf(tmp_path)
        assert not caplog.messages
        edit(tmp_path, {"twist": 1, "warp": {}, "num_experts_per_tok": 3, "pretraining_tp": 2})
        ModelConfig.from_hf(tmp_path)
    (line,) = caplog.messages
    assert line.endswith("config.json: unknown fields, which are not read: twist, warp")
    edit(tmp_path, {"rope_scaling": {**LINEAR, "stretch": 2}}, ("twist", "warp"))
    ModelConfig.from_hf(tmp_path)
    assert "rope parameters: unknown fields, which are not read: stretch" in caplog.messages[-1]
