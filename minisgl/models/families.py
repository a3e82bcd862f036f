"""The families of decoders, one row each: how they differ, and how their weights are named.

A row says what the architecture's code fixes. What a checkpoint chooses is read from its
config.json by `minisgl.models.config`: `REQUIRED` fields, and the family's `defaults`, which a
checkpoint may leave out. What the code of transformers does not read for a family is in neither.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

# Which layers have a window, where the checkpoint has one but no `layer_types`.
Windows = Literal["all", "above max_window_layers", "all but every nth"]


@dataclass(frozen=True)
class Family:
    """What all models of one architecture share."""

    defaults: Mapping[str, Any]
    nested: bool = False  # the decoder's fields are in text_config
    qk_norm: bool = False  # queries and keys are normalised per head
    qkv_bias: bool | None = False  # None: as the checkpoint's attention_bias says
    out_bias: bool | None = False  # None: as the checkpoint's attention_bias says
    sandwich_norms: bool = False  # blocks are normalised after, too
    norm_unit_offset: bool = False  # norms scale by 1 + weight
    scaled_embedding: bool = False  # embeddings times sqrt(hidden_size)
    activation_field: str = "hidden_act"
    windows: Windows = "all"
    # Name prefixes in the checkpoint -> the ones of layers and loader; the first that fits is used.
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()  # prefixes, behind any "model.", of what is not the decoder's


_REQUIRED = """
    vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    max_position_embeddings
"""
REQUIRED = frozenset(_REQUIRED.split())
# The optional fields of all families, each with what a checkpoint has that leaves it out.
_COMMON = {
    "tie_word_embeddings": False,
    "rope_theta": 10_000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": 1.0,
    "num_key_value_heads": None,  # as many as there are heads
    "head_dim": None,  # hidden_size / num_attention_heads
    "rms_norm_eps": 1e-6,
    "eos_token_id": None,
    "dtype": None,
    "is_causal": True,
    "per_layer_config": None,
    "quantization_config": None,
}
_LLAMA = _COMMON | {"hidden_act": "silu", "original_max_position_embeddings": None}
_QWEN2 = _LLAMA | {
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_QWEN3 = _QWEN2 | {"head_dim": 128, "attention_bias": False}
_QWEN3_MOE = _LLAMA | {
    "num_key_value_heads": 4,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "decoder_sparse_step": 1,
    "mlp_only_layers": (),
    "norm_topk_prob": False,
}
_GEMMA = _COMMON | {
    "tie_word_embeddings": True,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "use_bidirectional_attention": False,
}
_GEMMA2 = _GEMMA | {
    "vocab_size": 256_000,
    "max_position_embeddings": 8192,
    "original_max_position_embeddings": None,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
_GEMMA3 = _GEMMA | {
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
}
# What a family computes with whose row lacks the field, whatever its checkpoints say.
LACKING: Mapping[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": True,
    "sliding_window": None,
    "sliding_window_pattern": 2,
    "layer_types": None,
    "original_max_position_embeddings": None,
    "query_pre_attn_scalar": None,  # the head size
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "num_experts": 0,
    "use_bidirectional_attention": False,
}


def _gemma(defaults: Mapping[str, Any], **fields: Any) -> Family:
    return Family(
        defaults=defaults,
        sandwich_norms=True,
        norm_unit_offset=True,
        scaled_embedding=True,
        qkv_bias=None,
        out_bias=None,
        activation_field="hidden_activation",
        windows="all but every nth",
        **fields,
    )


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        defaults=_LLAMA | {"attention_bias": False, "mlp_bias": False},
        qkv_bias=None,
        out_bias=None,
    ),
    "MistralForCausalLM": Family(
        defaults=_LLAMA | {"num_key_value_heads": 8, "sliding_window": 4096}
    ),
    "Qwen2ForCausalLM": Family(defaults=_QWEN2, qkv_bias=True, windows="above max_window_layers"),
    "Qwen3ForCausalLM": Family(
        defaults=_QWEN3,
        qk_norm=True,
        qkv_bias=None,
        out_bias=None,
        windows="above max_window_layers",
    ),
    "Qwen3MoeForCausalLM": Family(
        defaults=_QWEN3_MOE,
        qk_norm=True,
        qkv_bias=None,
        out_bias=None,
    ),
    "Gemma2ForCausalLM": _gemma(_GEMMA2),
    "Gemma3ForCausalLM": _gemma(_GEMMA3 | {"final_logit_softcapping": None}, qk_norm=True),
    "Gemma3ForConditionalGeneration": _gemma(
        _GEMMA3,
        nested=True,
        qk_norm=True,
        renames=(
            ("language_model.model.", "model."),
            ("model.language_model.", "model."),
            ("language_model.lm_head.", "lm_head."),
        ),
        ignored=("vision_tower.", "multi_modal_projector."),
    ),
}


def find_family(architecture: str) -> Family:
    """Raises ValueError naming the architectures there are."""
    if architecture not in FAMILIES:
        raise ValueError(
            f"architecture {architecture!r} is not supported; there are {', '.join(FAMILIES)}"
        )
    return FAMILIES[architecture]
