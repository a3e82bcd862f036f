"""`ModelConfig`: what a decoder is. The one reader of Hugging Face's field names.

Both spellings of transformers are read: v4 (`rope_theta`, `rope_scaling`, `torch_dtype`,
`sliding_window_pattern`) and v5 (`rope_parameters`, by layer type where they differ; `dtype`,
`layer_types`).
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minisgl.layers.mlp import MoeConfig
from minisgl.layers.rotary import LinearScaling, Llama3Scaling, Rope, YarnScaling
from minisgl.log import get_logger
from minisgl.models.families import FAMILIES, LACKING, REQUIRED, Family, find_family
from minisgl.models.fields import Fields
from minisgl.models.int_config import IntFormat, read_int_format

log = get_logger(__name__)

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
FULL, SLIDING = "full_attention", "sliding_attention"
# Other spellings of the fields read here.
RESPELLED = {"torch_dtype": "dtype", "num_local_experts": "num_experts"}
# Fields whose other values than the default change what is computed, by code there is none of here.
ONLY = ("use_bidirectional_attention", "is_causal", "per_layer_config")
# What a model of several modalities states beside its decoder's fields.
OUTER = {"tie_word_embeddings", "eos_token_id", "dtype", "torch_dtype", "quantization_config"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Of all types: each reads its own.
_ROPE_FIELDS = """
    attention_factor beta_fast beta_slow factor high_freq_factor long_factor low_freq_factor
    mrope_section mscale mscale_all_dim original_max_position_embeddings partial_rotary_factor
    rope_theta rope_type short_factor truncate type
"""
# Fields of other families are known too. These are without effect on any: transformers keeps them
# for training, generation and its own use, or stopped reading them.
_WITHOUT_EFFECT = """
    _attn_implementation _attn_implementation_autoset _name_or_path _sliding_window_pattern
    architectures attention_dropout auto_map bos_token_id cache_implementation
    chunk_size_feed_forward do_sample gradient_checkpointing id2label initializer_range
    is_encoder_decoder label2id max_length max_new_tokens min_length model_type name_or_path
    num_return_sequences output_attentions output_hidden_states output_router_logits output_scores
    pad_token_id pretraining_tp problem_type repetition_penalty return_dict rope_interleaved
    router_aux_loss_coef sep_token_id temperature tokenizer_class top_k top_p torchscript
    transformers_version unsloth_fixed unsloth_version use_cache
"""


@dataclass(frozen=True)
class LayerConfig:
    """What may differ from layer to layer."""

    rope: Rope
    window: int | None  # a query sees so many keys, its own included
    moe: MoeConfig | None  # a dense block otherwise


@dataclass(frozen=True)
class ModelConfig:
    """What one decoder is; sizes are those of the whole model, before any sharding."""

    architecture: str
    family: Family
    vocab_size: int
    hidden_size: int
    inner_size: int  # of dense feed-forward blocks
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerConfig, ...]
    activation: str  # "silu" or "gelu_tanh"
    norm_eps: float
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    tied_embeddings: bool
    max_context: int  # tokens of prompt and output together
    eos_token_ids: tuple[int, ...]
    dtype: torch.dtype  # of the checkpoint, where it is not quantised
    int_format: IntFormat | None = None  # how quantised matrices are stored, if not in GGUF

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def embedding_scale(self) -> float | None:
        return math.sqrt(self.hidden_size) if self.family.scaled_embedding else None

    def cost_sizes(self, dtype: torch.dtype) -> dict[str, Any]:
        """The sizes that decide what a step costs, in plain numbers, for weights in `dtype`."""
        moe = next((layer.moe for layer in self.layers if layer.moe is not None), None)
        windows = [layer.window for layer in self.layers if layer.window is not None]
        return {
            "layers": self.num_layers,
            "hidden": self.hidden_size,
            "heads": self.num_heads,
            "kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate": moe.inner_size if moe else self.inner_size,
            "vocab": self.vocab_size,
            "experts": moe.num_experts if moe else 0,
            "experts_per_token": moe.top_k if moe else 0,
            "window": windows[0] if windows else None,
            "windowed_layers": len(windows),
            "bytes_per_weight": float(dtype.itemsize),
            "bytes_per_kv": float(dtype.itemsize),
        }

    @classmethod
    def from_hf(cls, path: str | Path) -> "ModelConfig":
        """Read config.json, and generation_config.json where there is one, of a directory; or what
        a GGUF file says of the same.

        Raises ValueError naming a folder without a config.json, or the field for anything that is
        missing, wrong, or asks for what is not supported.
        """
        path = Path(path)
        if path.suffix == ".gguf":
            return cls.from_dict(_of_gguf(path)[0], where=str(path))
        if not (file := path / "config.json").is_file():
            raise ValueError(
                f"{path} holds no model: there is neither a config.json, with .safetensors files "
                "beside it, nor a .gguf file"
            )
        return cls.from_dict(read_json(file), read_generation(path)[0], where=str(file))

    @classmethod
    def from_dict(
        cls,
        config: Mapping[str, Any],
        generation: Mapping[str, Any] | None = None,
        *,
        where: str = "config.json",
    ) -> "ModelConfig":
        """As `from_hf`, of the parsed files."""
        architectures = config.get("architectures") or []
        if len(architectures) != 1:
            raise ValueError(f"{where}: architectures must name one, got {architectures!r}")
        family = find_family(architectures[0])
        values = dict(config)
        if family.nested:
            outer = {name: config[name] for name in OUTER if config.get(name) is not None}
            values = {**(config.get("text_config") or {}), "tie_word_embeddings": True, **outer}
        for spelling, name in RESPELLED.items():
            if spelling in values and values.get(name) is None:
                values[name] = values.pop(spelling)
        known = REQUIRED | family.defaults.keys()
        elsewhere = set(RESPELLED).union(*(other.defaults for other in FAMILIES.values()))
        _warn_of_unknown(where, values.keys() - known - elsewhere - set(_WITHOUT_EFFECT.split()))
        given = {name: value for name, value in values.items() if name in known}
        fields = Fields(given, where, {**LACKING, **family.defaults})
        for name in ONLY:
            if fields.raw(name) not in (None, fields.defaults[name]):
                raise fields.bad(name, json.dumps(fields.defaults[name]))
        return _read(architectures[0], family, fields, generation or {})


def _warn_of_unknown(where: str, names: Iterable[str]) -> None:
    if names:
        log.warning("%s: unknown fields, which are not read: %s", where, ", ".join(sorted(names)))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file. Raises ValueError naming the file that holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_generation(path: Path) -> tuple[dict[str, Any], str]:
    """generation_config.json of a directory, or what a GGUF file says of it, and where it stands.

    Empty where there is none.
    """
    if path.suffix == ".gguf":
        return _of_gguf(path)[1], str(path)
    file = path / "generation_config.json"
    return read_json(file) if file.exists() else {}, str(file)


def _of_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    from minisgl.gguf.config import read_config
    from minisgl.gguf.header import read_gguf

    return read_config(read_gguf(path))


def _read(
    architecture: str, family: Family, fields: Fields, generation: Mapping[str, Any]
) -> ModelConfig:
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.optional_integer("num_key_value_heads") or num_heads
    if num_heads % num_kv_heads:
        raise fields.bad("num_key_value_heads", f"a divisor of num_attention_heads ({num_heads})")
    hidden_size = fields.integer("hidden_size")
    head_dim = fields.optional_integer("head_dim") or hidden_size // num_heads
    biased = fields.boolean("attention_bias")
    eos = Fields(generation, "generation_config.json", {"eos_token_id": None})
    vocab_size = fields.integer("vocab_size")
    stored = fields.raw("quantization_config")
    return ModelConfig(
        architecture=architecture,
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        inner_size=fields.integer("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        layers=_read_layers(family, fields, head_dim),
        activation=ACTIVATIONS[fields.text(family.activation_field, ACTIVATIONS)],
        norm_eps=fields.number("rms_norm_eps"),
        attention_scale=(fields.optional_number("query_pre_attn_scalar") or head_dim) ** -0.5,
        attention_softcap=fields.optional_number("attn_logit_softcapping"),
        logit_softcap=fields.optional_number("final_logit_softcapping"),
        qkv_bias=biased if family.qkv_bias is None else family.qkv_bias,
        out_bias=biased if family.out_bias is None else family.out_bias,
        mlp_bias=fields.boolean("mlp_bias"),
        tied_embeddings=fields.boolean("tie_word_embeddings"),
        max_context=_max_context(fields),
        eos_token_ids=eos.integers("eos_token_id") or fields.integers("eos_token_id"),
        dtype=DTYPES[fields.text("dtype", DTYPES)] if fields.given("dtype") else torch.float32,
        int_format=None if stored is None else read_int_format(stored, fields.where),
    )


def _read_layers(family: Family, fields: Fields, head_dim: int) -> tuple[LayerConfig, ...]:
    count = fields.integer("num_hidden_layers")
    window = fields.optional_integer("sliding_window")
    window = window if fields.boolean("use_sliding_window") else None
    types = _layer_types(family, fields, count, window)
    if SLIDING in types and window is None:
        raise fields.bad(
            "sliding_window",
            "an integer of at least 1, and use_sliding_window true where the family has it, as "
            "some layers have a window",
        )
    ropes = {kind: _read_rope(fields, kind, head_dim) for kind in sorted(set(types))}
    return tuple(
        LayerConfig(
            rope=ropes[kind],
            window=window if kind == SLIDING else None,
            moe=_read_moe(fields, index),
        )
        for index, kind in enumerate(types)
    )


def _layer_types(family: Family, fields: Fields, count: int, window: int | None) -> list[str]:
    types = fields.raw("layer_types")
    if types is not None:
        if not isinstance(types, list) or len(types) != count or not {*types} <= {FULL, SLIDING}:
            wanted = f"a list of num_hidden_layers ({count}) names, each {FULL!r} or {SLIDING!r}"
            raise fields.bad("layer_types", wanted)
        return types
    if family.windows == "all":
        return [SLIDING if window else FULL] * count
    if family.windows == "above max_window_layers":
        full = min(fields.integer("max_window_layers", minimum=0), count) if window else count
        return [FULL] * full + [SLIDING] * (count - full)
    period = fields.integer("sliding_window_pattern")
    return [SLIDING if (index + 1) % period else FULL for index in range(count)]


def _read_moe(fields: Fields, index: int) -> MoeConfig | None:
    if not fields.raw("num_experts"):
        return None
    dense = index in fields.integers("mlp_only_layers")
    if dense or (index + 1) % fields.integer("decoder_sparse_step"):
        return None
    num_experts = fields.integer("num_experts")
    top_k = fields.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise fields.bad("num_experts_per_tok", f"at most num_experts ({num_experts})")
    return MoeConfig(
        num_experts=num_experts,
        top_k=top_k,
        inner_size=fields.integer("moe_intermediate_size"),
        renormalize=fields.boolean("norm_topk_prob"),
    )


def _rope_section(fields: Fields, kind: str) -> dict[str, Any]:
    """The rope fields of layers of one kind, from both spellings, as transformers unites them.

    Where kinds differ, `rope_scaling` is added to that of full layers; elsewhere it replaces
    `rope_parameters`, and only the file's own original context has a say.
    """
    stated = fields.raw("rope_parameters") or {}
    scaling = fields.raw("rope_scaling") or {}
    if "rope_local_base_freq" in fields.defaults:
        theta = "rope_local_base_freq" if kind == SLIDING else "rope_theta"
        section = (stated.get(kind) or {"rope_type": "default"}) | (scaling if kind == FULL else {})
        section["truncate"] = stated.get("truncate")
    else:
        theta, section = "rope_theta", dict(scaling or stated)
        if fields.given(name := "original_max_position_embeddings"):
            section[name] = fields.raw(name)
    section.setdefault("rope_theta", fields.raw(theta))
    return {name: value for name, value in section.items() if value is not None}


def _read_rope(fields: Fields, kind: str, head_dim: int) -> Rope:
    section = _rope_section(fields, kind)
    rope_type = section.get("rope_type") or section.get("type", "default")
    rope = Fields(
        section,
        f"{fields.where}: rope parameters",
        {
            "partial_rotary_factor": fields.raw("partial_rotary_factor"),
            "original_max_position_embeddings": fields.raw("max_position_embeddings"),
            "attention_factor": None,
            "mscale": None,
            "mscale_all_dim": None,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": True,
        },
    )
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"{rope.where}: rope_type {rope_type!r} is not one of {list(ROPE_TYPES)}")
    _warn_of_unknown(rope.where, section.keys() - set(_ROPE_FIELDS.split()))
    # transformers rotates whole heads, and only these families' scalings compute with a part.
    if rope_type != "default" and rope.raw("partial_rotary_factor") != 1:
        raise rope.bad("partial_rotary_factor", f"1 with rope_type {rope_type!r}")
    if head_dim % 2:
        raise fields.bad("head_dim", f"even, as rotary embeddings need it; it is {head_dim}")
    return Rope(rope.number("rope_theta"), head_dim, _read_scaling(rope_type, rope))


def _read_scaling(
    rope_type: str, rope: Fields
) -> LinearScaling | Llama3Scaling | YarnScaling | None:
    if rope_type == "linear":
        return LinearScaling(rope.number("factor"))
    if rope_type == "llama3":
        return Llama3Scaling(
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_context=rope.integer("original_max_position_embeddings"),
        )
    if rope_type == "yarn":
        return YarnScaling(
            factor=rope.number("factor"),
            original_context=rope.integer("original_max_position_embeddings"),
            attention_factor=_yarn_attention_factor(rope),
            beta_fast=rope.number("beta_fast"),
            beta_slow=rope.number("beta_slow"),
            truncate=rope.boolean("truncate"),
        )
    return None


def _yarn_attention_factor(rope: Fields) -> float:
    def mscale(weight: float) -> float:
        return max(0.1 * weight * math.log(rope.number("factor")), 0.0) + 1.0

    stated = rope.optional_number("attention_factor")
    if stated is not None:
        return stated
    above, below = rope.optional_number("mscale"), rope.optional_number("mscale_all_dim")
    return mscale(above) / mscale(below) if above and below else mscale(1.0)


def _max_context(fields: Fields) -> int:
    """The longest context of the model; YaRN checkpoints may state only the original model's."""
    stated = fields.integer("max_position_embeddings")
    section = _rope_section(fields, FULL)
    if section.get("rope_type", section.get("type")) == "yarn":
        original = section.get("original_max_position_embeddings") or stated
        rope = Fields(section, f"{fields.where}: rope parameters", {})
        return max(stated, int(original * rope.number("factor")))
    return stated
