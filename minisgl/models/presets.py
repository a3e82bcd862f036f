"""Published models by name: what their config.json says, for use without a checkpoint.

The one table of model sizes: everything else that is said of these models follows from it by
`ModelConfig.from_dict`. No torch here, so that a command can offer the names at once.
"""

from typing import Any

HfConfig = dict[str, Any]

_LLAMA3_ROPE: HfConfig = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA: HfConfig = {
    "rope_theta": 500_000.0,
    "rope_scaling": _LLAMA3_ROPE | {"factor": 8.0},
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}
MISTRAL: HfConfig = {
    "sliding_window": None,
    "rope_theta": 1e6,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN3: HfConfig = {
    "rope_theta": 1e6,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}


def decoder(
    family: str,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    inner: int,
    vocab: int,
    **facts: Any,
) -> HfConfig:
    """The config.json of a decoder in bf16 of an architecture "{family}ForCausalLM".

    `facts` are further fields by Hugging Face's names, or other values of those set here.
    """
    return {
        "architectures": [f"{family}ForCausalLM"],
        "model_type": family.lower().replace("moe", "_moe"),
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": inner,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **facts,
    }


PRESETS: dict[str, HfConfig] = {
    "llama-3.2-1b": decoder(
        "Llama", 16, 2048, 32, 8, 64, 8192, 128_256,
        **LLAMA | {"rope_scaling": _LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True},
    ),
    "llama-3.1-8b": decoder("Llama", 32, 4096, 32, 8, 128, 14336, 128_256, **LLAMA),
    "llama-3.1-70b": decoder("Llama", 80, 8192, 64, 8, 128, 28672, 128_256, **LLAMA),
    "mistral-7b": decoder("Mistral", 32, 4096, 32, 8, 128, 14336, 32_768, **MISTRAL),
    "qwen3-0.6b": decoder(
        "Qwen3", 28, 1024, 16, 8, 128, 3072, 151_936, **QWEN3, tie_word_embeddings=True
    ),
    "qwen3-8b": decoder("Qwen3", 36, 4096, 32, 8, 128, 12288, 151_936, **QWEN3),
    "qwen3-14b": decoder("Qwen3", 40, 5120, 40, 8, 128, 17408, 151_936, **QWEN3),
    "qwen3-32b": decoder("Qwen3", 64, 5120, 64, 8, 128, 25600, 151_936, **QWEN3),
    "qwen3-30b-a3b": decoder(
        "Qwen3Moe", 48, 2048, 32, 4, 128, 6144, 151_936, **QWEN3,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True,
    ),
}  # fmt: skip
