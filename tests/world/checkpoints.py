"""Tiny random checkpoints of every family, made by transformers with weights of a useful scale."""

from pathlib import Path
from typing import Any

import torch
import transformers

TINY = {
    "vocab_size": 211,
    "hidden_size": 48,
    "intermediate_size": 90,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MOE = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
GEMMA = {"head_dim": 20, "sliding_window": 9, "query_pre_attn_scalar": 30}

# Case -> (class prefix in transformers, fields beyond TINY).
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 6}),
    "llama3-biased-tied": (
        "Llama",
        {
            "rope_parameters": LLAMA3,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "llama-linear-head_dim": ("Llama", {"rope_parameters": LINEAR, "head_dim": 20}),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral-window": ("Mistral", {"sliding_window": 9, "head_dim": 16}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window-tied": (
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-yarn-biased": (
        "Qwen3",
        {"head_dim": 24, "rope_parameters": YARN, "attention_bias": True},
    ),
    "qwen3-moe": ("Qwen3Moe", {"head_dim": 16, "norm_topk_prob": True, **MOE}),
    "qwen3-moe-mixed": (
        "Qwen3Moe",
        {"head_dim": 16, "norm_topk_prob": False, "mlp_only_layers": [1], **MOE},
    ),
    "gemma2": (
        "Gemma2",
        {"tie_word_embeddings": True, "attn_logit_softcapping": 5.0, **GEMMA},
    ),
    "gemma3": (
        "Gemma3Text",
        {
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 100000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
            },
            **GEMMA,
        },
    ),
}
# The same decoder inside a model of several modalities, whose weights have longer names.
CHECKPOINTS["gemma3-multimodal"] = ("Gemma3", CHECKPOINTS["gemma3"][1])
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MODEL_CLASSES = {
    "Gemma3Text": "Gemma3ForCausalLM",
    "Gemma3": "Gemma3ForConditionalGeneration",
}


def make(name: str, folder: Path, seed: int = 0) -> transformers.PreTrainedModel:
    """The transformers model of a case, in fp32 and evaluation mode; saved in `folder`."""
    prefix, fields = CHECKPOINTS[name]
    facts = {**TINY, **fields}
    if prefix == "Gemma3":
        facts = {"text_config": facts, "vision_config": VISION, "mm_tokens_per_image": 4}
    config = getattr(transformers, f"{prefix}Config")(**facts)
    config._attn_implementation = "eager"
    model_class = getattr(transformers, MODEL_CLASSES.get(prefix, f"{prefix}ForCausalLM"))
    model = model_class(config).eval()
    randomize(model, seed)
    model.save_pretrained(folder)
    return model


def randomize(model: transformers.PreTrainedModel, seed: int) -> None:
    """Weights that keep activations of order one: transformers' own would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("bias"):
                parameter.copy_(noise * 0.3)
            elif "norm" in name:
                parameter.add_(noise * 0.2)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
