"""GGUF files of the tiny checkpoints, written by the gguf package as converters do."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers
from gguf import GGMLQuantizationType as Type

from tests.server.small_tokenizers import byte_level
from tests.world.checkpoints import CHECKPOINTS, make

# Cases of `CHECKPOINTS` in the sizes that quantised rows need, and as a GGUF file can say them.
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SIZES = {"hidden_size": 96, "intermediate_size": 160}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {}),
    "llama3-biased-tied": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-linear-head_dim": ("llama", {}),
    "llama-yarn": ("llama", {}),
    "mistral-full": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-moe": ("qwen3moe", {"moe_intermediate_size": 64}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 20}),
    "gemma3": (
        "gemma3",
        {
            "query_pre_attn_scalar": 20,
            "num_hidden_layers": 7,
            "layer_types": None,
            "rope_parameters": GEMMA3_ROPE,
        },
    ),
}


def make_gguf(
    name: str, path: Path, kind: Type = Type.F32, **fields: Any
) -> transformers.PreTrainedModel:
    """The transformers model of a case, and its file at `path`, matrices in the type `kind`.

    `fields` are those of its config that differ. The model has the weights of the file.
    """
    arch, own = CASES[name]
    prefix, known = CHECKPOINTS[name]
    changed = {**known, **SIZES, **own, **fields}
    CHECKPOINTS["gguf"] = prefix, {k: v for k, v in changed.items() if v is not None}
    try:
        model = make("gguf", path.parent / "hf")
    finally:
        del CHECKPOINTS["gguf"]
    writer = gguf.GGUFWriter(path, arch)
    _write_config(writer, model.config, arch)
    write_byte_level(writer, model.config.vocab_size)
    _write_tensors(writer, model, arch, kind)
    finish(writer)
    return model


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_byte_level(writer: gguf.GGUFWriter, size: int = 0, pre: str = "gpt-2") -> None:
    """The vocabulary of `byte_level`, cut or filled up to `size` tokens where there is one."""
    backend = byte_level()
    described = backend.get_vocab()
    tokens = sorted(described, key=lambda token: described[token])
    added = {i: token.special for i, token in backend.get_added_tokens_decoder().items()}
    kinds = [(4, 3)[added[i]] if i in added else 1 for i in range(len(tokens))]
    if size:
        spare = [f"[PAD{i}]" for i in range(len(tokens), size)]
        tokens, kinds = (tokens + spare)[:size], (kinds + [5] * len(spare))[:size]
    merges = [" ".join(pair) for pair in merges_of(backend) if "".join(pair) in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)


def merges_of(backend: Any) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]


def _write_config(writer: gguf.GGUFWriter, config: Any, arch: str) -> None:
    rope = config.rope_parameters
    full = rope.get("full_attention", rope)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_freq_base(full["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if arch != "qwen2":
        writer.add_rope_dimension_count(head_dim)
    if (
        arch not in ("llama", "qwen2")
        or head_dim * config.num_attention_heads != config.hidden_size
    ):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if full["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(full["rope_type"]))
        writer.add_rope_scaling_factor(full["factor"])
    if full["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
    if arch == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if arch.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _write_tensors(writer: gguf.GGUFWriter, model: Any, arch: str, kind: Type) -> None:
    """Writes them, and gives the model what rounding to `kind` has left of them."""
    config, experts = model.config, {}
    known = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[arch], config.num_hidden_layers)
    if config.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    for name, parameter in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        x = parameter.numpy().copy()
        if ".experts." in name:  # transformers has gates and ups in one
            layer = name.split(".")[2]
            if name.endswith("gate_up_proj"):
                halves = np.split(x, 2, axis=1)
                experts = {f"blk.{layer}.ffn_gate_exps.weight": halves[0]}
                experts[f"blk.{layer}.ffn_up_exps.weight"] = halves[1]
            else:
                experts = {f"blk.{layer}.ffn_down_exps.weight": x}
            rounded = [_add(writer, n, part, kind) for n, part in experts.items()]
            parameter.copy_(_torch(np.concatenate(rounded, axis=1)))
            continue
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert written is not None, name
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            x = x + 1
        if arch.startswith("gemma") and ".post_attention_layernorm." in name:
            written = f"blk.{name.split('.')[2]}.post_attention_norm.weight"
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for part, count in heads.items():
            if arch == "llama" and part in name:
                x = x.reshape(count, 2, -1, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)
        rounded = _add(writer, written, x, kind)
        for part, count in heads.items():
            if arch == "llama" and part in name:
                split = rounded.reshape(count, -1, 2, *x.shape[1:])
                rounded = split.swapaxes(1, 2).reshape(x.shape)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            rounded = rounded - 1
        parameter.copy_(_torch(rounded))


def _add(writer: gguf.GGUFWriter, name: str, x: np.ndarray, kind: Type) -> np.ndarray:
    """Vectors stay fp32, as converters leave them."""
    kind = kind if x.ndim > 1 else Type.F32
    x = np.ascontiguousarray(x, np.float32)
    stored = gguf.quantize(x, kind)
    writer.add_tensor(name, stored, raw_dtype=kind)
    return gguf.dequantize(stored, kind).reshape(x.shape)


def _torch(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(x))


def llama3_factors(config: Any) -> np.ndarray:
    """What each frequency is divided by, wavelength by wavelength, as the converter has it."""
    rope, found = config.rope_parameters, []
    size = config.hidden_size // config.num_attention_heads
    context = rope["original_max_position_embeddings"]
    low, high = context / rope["low_freq_factor"], context / rope["high_freq_factor"]
    for i in range(0, size, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / size)
        if wavelength < high:
            found.append(1.0)
        elif wavelength > low:
            found.append(rope["factor"])
        else:
            smooth = (context / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"]
            )
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(found, np.float32)


def write_tensors_only(path: Path, tensors: dict[str, tuple[np.ndarray, Type]]) -> None:
    """A file with nothing but these, stored as they are given, uint8 [..., bytes of a row]."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, (stored, kind) in tensors.items():
        writer.add_tensor(name, stored, raw_dtype=kind)
    finish(writer)


def sentencepiece(tokens: Sequence[str], scores: Sequence[float], writer: gguf.GGUFWriter) -> None:
    """A SentencePiece vocabulary: <unk>, <s>, </s>, the bytes, then these."""
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*head, *tokens])
    writer.add_token_scores([0.0] * len(head) + list(scores))
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(tokens))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
