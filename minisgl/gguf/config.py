"""What a GGUF file says of its model, by the names of config.json and generation_config.json."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minisgl.gguf.header import Gguf, TensorInfo, shown
from minisgl.gguf.tokenizer import KEY, end_ids
from minisgl.gguf.weights import LLAMA3_FACTORS, GgufSlice, GgufWeights

Json = dict[str, Any]

MAX_SIZE, MAX_LAYERS, MAX_CONTEXT = 2**20, 2**10, 2**20  # rotary tables hold the whole context


@dataclass(frozen=True)
class _Family:
    """An architecture of GGUF files: what its config.json says that they do not."""

    architecture: str
    paired: bool = False  # rows of queries and keys lie in pairs that are rotated together
    gemma: bool = False
    own: Set[str] = frozenset()  # of its keys, those that not all have
    layers_of_27b: int = 0  # of the one size whose attention scale follows from its hidden size
    fixed: Mapping[str, Any] = field(default_factory=dict)


# Keys that only some architectures have; the others refuse them.
_EXPERTS = {"expert_count", "expert_used_count", "expert_feed_forward_length"}
_EXPERTS |= {"expert_weights_norm"}
_GEMMA2 = {"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
_GEMMA3 = {"attention.sliding_window", "attention.sliding_window_pattern"}
_GEMMA3 |= {"final_logit_softcapping", "rope.freq_base_swa"}
_OWN = _EXPERTS | _GEMMA2 | _GEMMA3
_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", paired=True),
    "qwen2": _Family("Qwen2ForCausalLM"),
    "qwen3": _Family("Qwen3ForCausalLM"),
    "qwen3moe": _Family("Qwen3MoeForCausalLM", own=_EXPERTS, fixed={"norm_topk_prob": True}),
    "gemma2": _Family("Gemma2ForCausalLM", gemma=True, own=_GEMMA2, layers_of_27b=46),
    "gemma3": _Family("Gemma3ForCausalLM", gemma=True, own=_GEMMA3, layers_of_27b=62),
}
# Behind "ARCHITECTURE.": the field, and the limit of an integer.
_FIELDS: dict[str, tuple[str, int | None]] = {
    "block_count": ("num_hidden_layers", MAX_LAYERS),
    "context_length": ("max_position_embeddings", MAX_CONTEXT),
    "embedding_length": ("hidden_size", MAX_SIZE),
    "feed_forward_length": ("intermediate_size", MAX_SIZE),
    "attention.head_count": ("num_attention_heads", MAX_SIZE),
    "attention.head_count_kv": ("num_key_value_heads", MAX_SIZE),
    "attention.key_length": ("head_dim", MAX_SIZE),
    "attention.sliding_window": ("sliding_window", MAX_CONTEXT),
    "attention.sliding_window_pattern": ("sliding_window_pattern", MAX_LAYERS),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", None),
    "attention.causal": ("is_causal", None),
    "attn_logit_softcapping": ("attn_logit_softcapping", None),
    "final_logit_softcapping": ("final_logit_softcapping", None),
    "rope.freq_base": ("rope_theta", None),
    "rope.freq_base_swa": ("rope_local_base_freq", None),
    "expert_count": ("num_experts", MAX_LAYERS),
    "expert_used_count": ("num_experts_per_tok", MAX_LAYERS),
    "expert_feed_forward_length": ("moe_intermediate_size", MAX_SIZE),
    "expert_weights_norm": ("norm_topk_prob", None),
}
_REQUIRED = ("block_count", "embedding_length", "attention.head_count")
_SCALING = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
_SAMPLING = ("temp", "top_k", "top_p", "min_p")
# Of every file: what is said by the tensors, or of how it was made.
_KNOWN = {"vocab_size", "rope.dimension_count", "attention.value_length", "rope.scaling.type"}
_KNOWN |= {"rope.scaling.finetuned", "rope.scale_linear", "tensor_data_layout"}
_KNOWN |= {f"rope.scaling.{key}" for key in _SCALING}
_LLAMA3: Json = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 8192}


def read_config(file: Gguf) -> tuple[Json, Json]:
    """config.json and generation_config.json, each field checked against its limit.

    Raises ValueError naming key and value, or the architectures there are; also for a key of the
    architecture that is not known, as it may change what is computed.
    """
    name, family = _family(file)
    config: Json = {"architectures": [family.architecture], **family.fixed}
    config |= _read_fields(file, name, family)
    embedding = file.tensors.get("token_embd.weight")
    tokens = len(file.texts(f"{KEY}.tokens"))
    if embedding is None or embedding.shape[0] != tokens:
        shape = None if embedding is None else embedding.shape
        raise file.bad("token_embd.weight", f"a row for each of the {tokens} tokens", shape)
    config |= {
        "vocab_size": tokens,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "eos_token_id": end_ids(file),
        "dtype": _dtype(file),
    }
    config["head_dim"] = _head_dim(file, name, config)
    config["rope_scaling"] = _rope_scaling(file, name, config)
    if family.gemma:
        is_27b = config["num_hidden_layers"] == family.layers_of_27b
        of_27b = config["hidden_size"] // config["num_attention_heads"]
        config["query_pre_attn_scalar"] = of_27b if is_27b else config["head_dim"]
    sampling = {key: file.scalar(f"general.sampling.{key}") for key in _SAMPLING}
    sampling["temperature"] = sampling.pop("temp")
    return config, {key: value for key, value in sampling.items() if value is not None}


def _read_fields(file: Gguf, name: str, family: _Family) -> Json:
    """What the keys of the architecture say."""
    found: Json = {}
    unread = {key for key in file.metadata if key.startswith(f"{name}.")}
    unread -= {f"{name}.{key}" for key in _KNOWN}
    for key, (hf_name, most) in _FIELDS.items():
        full = f"{name}.{key}"
        value = file.scalar(full) if most is None else file.integer(full, most)
        if not value and key in _REQUIRED:
            raise file.bad(full, f"an integer of 1 to {most}", value)
        # Where another architecture's key is 0, it asks for nothing.
        if key in family.own or key not in _OWN or value == 0:
            unread.discard(full)
            if value is not None:
                found[hf_name] = value
    if unread:
        value = shown(file.metadata[key := min(unread)])
        raise ValueError(f"{file.path}: {key} is not read for {name}, got {value}")
    return found


def read_weights(file: Gguf) -> GgufWeights:
    """The tensors as the model of `read_config` has them."""
    name, family = _family(file)
    heads = None
    if family.paired:
        queries = file.integer(f"{name}.attention.head_count", MAX_SIZE, 0)
        keys = file.integer(f"{name}.attention.head_count_kv", MAX_SIZE, queries)
        heads = queries or 0, keys or 0
    return GgufWeights(file, heads, family.gemma)


def _family(file: Gguf) -> tuple[str, _Family]:
    name = file.text("general.architecture")
    if name not in _FAMILIES:
        raise file.bad("general.architecture", f"one of {', '.join(_FAMILIES)}", name)
    return name, _FAMILIES[name]


def _head_dim(file: Gguf, name: str, config: Json) -> int:
    """The size of queries, keys and values, of which all is rotated."""
    size: int = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    for key in (f"{name}.attention.value_length", f"{name}.rope.dimension_count"):
        if (given := file.integer(key, MAX_SIZE, size)) != size:
            raise file.bad(key, f"{size}, as the heads' keys have", given)
    return size


def _dtype(file: Gguf) -> str:
    """What its matrices are in where none is quantised; bfloat16 for what was."""
    kinds = {info.type.name for info in file.tensors.values() if len(info.shape) > 1}
    if kinds <= {"F32"}:
        return "float32"
    return "float16" if kinds <= {"F32", "F16"} else "bfloat16"


def _rope_scaling(file: Gguf, name: str, config: Json) -> Json | None:
    factors = file.tensors.get(LLAMA3_FACTORS)
    stated = {hf: file.scalar(f"{name}.rope.scaling.{key}") for key, hf in _SCALING.items()}
    if stated["factor"] is None:  # older files have that of linear scaling
        stated["factor"] = file.scalar(f"{name}.rope.scale_linear")
    unscaled = stated["factor"] in (None, 0, 1)
    kind = file.text(f"{name}.rope.scaling.type", "none" if unscaled else "linear")
    if factors is not None and _FAMILIES[name].paired:
        if kind != "none":
            raise file.bad(f"{name}.rope.scaling.type", f"none beside {LLAMA3_FACTORS}", kind)
        return _llama3_scaling(file, factors, config)
    stated = {hf_name: value for hf_name, value in stated.items() if value is not None}
    return None if kind == "none" else {"rope_type": kind, **stated}


def _llama3_scaling(file: Gguf, info: TensorInfo, config: Json) -> Json:
    """The scaling that the file has as what each frequency is divided by."""
    pairs = config["head_dim"] // 2
    theta = config.get("rope_theta", 0.0)
    if info.shape != (pairs,) or type(theta) is not float or theta <= 0:
        wanted = f"of shape ({pairs},), with a rope.freq_base"
        raise file.bad(LLAMA3_FACTORS, wanted, (info.shape, theta))
    stored = GgufSlice(file, info, 0, info.shape)[(slice(None),)]
    factor = float(stored.max(initial=0.0))
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    turns = theta ** (-np.arange(pairs) / pairs) / (2 * np.pi)
    turns = turns * _LLAMA3["original_max_position_embeddings"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    if factor < 1 or not np.allclose(stored, 1 / (kept + (1 - kept) / factor), rtol=1e-3):
        wanted = f"those of {_LLAMA3} and the largest of them"
        raise file.bad(LLAMA3_FACTORS, wanted, stored.tolist())
    return {**_LLAMA3, "factor": factor}
