"""The one decoder: embed, then attention and feed-forward blocks with residuals, then norm.

What families differ in are fields of `ModelConfig`, read when layers are built.
"""

from collections.abc import Iterable

import torch

from minisgl.kernels.sampling import cap_logits
from minisgl.layers.attention import KV, Attention, AttentionSlices, ForwardInputs
from minisgl.layers.embedding import VocabTable
from minisgl.layers.linear import ColumnLinear, Part, RowLinear
from minisgl.layers.mlp import ACTIVATIONS, Mlp, Moe
from minisgl.layers.norm import RMSNorm
from minisgl.layers.rotary import Rope
from minisgl.layers.weights import Block, Placement
from minisgl.models.config import ModelConfig
from minisgl.trace import detail

# Rotary tables have this many more positions than the context, for drafts and a step in flight.
ROPE_SLACK = 256


class DecoderLayer(Block):
    """x + attention(norm x), then x + feed_forward(norm x), each normalised after too in Gemma.

    The norm that follows a sum computes it too, so a layer takes and returns what has been added up
    (`residual`) and what is still to be added (`x`). A block's output is in parts, one on each
    rank; the norm that follows adds them up too.
    """

    def __init__(
        self, config: ModelConfig, index: int, cos_sin: torch.Tensor, at: Placement
    ) -> None:
        self.name = f"layer {index}"
        self.comm = at.comm
        prefix, sandwich = f"model.layers.{index}", config.family.sandwich_norms

        def norm(name: str, of_parts: bool = False) -> RMSNorm:
            return make_norm(config, f"{prefix}.{name}", at, of_parts)

        self.attention_norm = norm("input_layernorm", not sandwich)
        self.attention = _attention(config, index, f"{prefix}.self_attn", cos_sin, at)
        self.attention_out_norm = norm("post_attention_layernorm") if sandwich else None
        mlp_norm = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        self.mlp_norm = norm(mlp_norm, not sandwich)
        self.mlp = _feed_forward(config, index, f"{prefix}.mlp", at)
        self.mlp_out_norm = norm("post_feedforward_layernorm") if sandwich else None

    def __call__(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        inputs: ForwardInputs,
        slices: AttentionSlices,
        kv: KV,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual, x = x, self.attention_norm(x)
        else:
            x, residual = self.attention_norm.add(x, residual)
        x = self.attention(x, inputs, slices, kv)
        if self.attention_out_norm is not None:
            x = self.attention_out_norm(self.comm.all_reduce(x))
        x, residual = self.mlp_norm.add(x, residual)
        x = self.mlp(x)
        if self.mlp_out_norm is not None:
            x = self.mlp_out_norm(self.comm.all_reduce(x))
        return x, residual


def make_norm(
    config: ModelConfig, name: str, at: Placement, of_parts: bool = False, size: int | None = None
) -> RMSNorm:
    """With `of_parts` the norm follows a block whose parts are to be added up."""
    weight = at.empty(size or config.hidden_size)
    unit_offset, comm = config.family.norm_unit_offset, at.comm if of_parts else None
    return RMSNorm(name, weight, config.norm_eps, unit_offset, comm)


def _attention(
    config: ModelConfig, index: int, prefix: str, cos_sin: torch.Tensor, at: Placement
) -> Attention:
    heads, size, hidden = config.num_heads, config.head_dim, config.hidden_size
    parts = [
        Part("q_proj", heads, size),
        Part("k_proj", config.num_kv_heads, size, repeated=True),
        Part("v_proj", config.num_kv_heads, size, repeated=True),
    ]
    qk_norm = None
    if config.family.qk_norm:
        names = (f"{prefix}.q_norm", f"{prefix}.k_norm")
        q_norm, k_norm = (make_norm(config, name, at, size=size) for name in names)
        qk_norm = q_norm, k_norm
    return Attention(
        ColumnLinear(prefix, hidden, parts, bias=config.qkv_bias, at=at),
        RowLinear(prefix, Part("o_proj", heads, size), hidden, bias=config.out_bias, at=at),
        qk_norm,
        cos_sin,
        config.attention_scale,
        config.layers[index].window,
        config.attention_softcap,
        at.attention,
    )


def _feed_forward(config: ModelConfig, index: int, prefix: str, at: Placement) -> Mlp | Moe:
    moe, hidden, inner = config.layers[index].moe, config.hidden_size, config.inner_size
    bias = config.mlp_bias
    if moe is not None:
        return Moe(prefix, hidden, moe, config.activation, at)
    parts = [Part("gate_proj", inner), Part("up_proj", inner)]
    return Mlp(
        ColumnLinear(prefix, hidden, parts, bias=bias, at=at),
        RowLinear(prefix, Part("down_proj", inner), hidden, bias=bias, at=at),
        ACTIVATIONS[config.activation],
    )


class Decoder(Block):
    """A decoder-only language model on one rank."""

    def __init__(self, config: ModelConfig, at: Placement) -> None:
        """Allocates every weight, unfilled. ValueError where the ranks cannot share the model."""
        self.config = config
        self.embedding = VocabTable("model.embed_tokens", config.vocab_size, config.hidden_size, at)
        tables: dict[Rope, torch.Tensor] = {}
        for layer in config.layers:
            if layer.rope not in tables:
                positions = config.max_context + ROPE_SLACK
                tables[layer.rope] = layer.rope.table(positions, at.device)
        self.layers = tuple(
            DecoderLayer(config, index, tables[layer.rope], at)
            for index, layer in enumerate(config.layers)
        )
        self.norm = make_norm(config, "model.norm", at, not config.family.sandwich_norms)
        self.head = self.embedding
        if not config.tied_embeddings:
            self.head = VocabTable("lm_head", config.vocab_size, config.hidden_size, at)
        # Rounded to the dtype, as the models were trained.
        self.embedding_scale = None
        if config.embedding_scale is not None:
            self.embedding_scale = torch.tensor(config.embedding_scale, dtype=at.dtype).item()

    @property
    def num_kv_heads(self) -> int:
        """Key heads of this rank: what its KV pool holds."""
        return self.layers[0].attention.num_kv_heads

    @property
    def weight_bytes(self) -> int:
        """What weights and rotary tables take, as they are packed."""
        return sum(_storages(self.tensors()).values())

    @property
    def read_bytes(self) -> int:
        """What of it a step reads that computes logits, with all experts: not the embedding's rows,
        nor tables."""
        found = _storages(t for block in (*self.layers, self.head) for t in block.tensors())
        tables = _storages(layer.attention.cos_sin for layer in self.layers)
        return sum(size for place, size in found.items() if place not in tables)

    @torch.inference_mode()
    def forward(self, inputs: ForwardInputs) -> torch.Tensor:
        """Hidden states [T, hidden] after the last norm; writes this step's KV."""
        x = self.embedding.embed(inputs.input_ids, self.embedding_scale)
        residual = None
        slices = AttentionSlices.of(inputs)
        for layer, kv in zip(self.layers, inputs.kv, strict=True):
            with detail(layer.name):
                x, residual = layer(x, residual, inputs, slices, kv)
        return self.norm(x) if residual is None else self.norm.add(x, residual)[0]

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [N, vocab] fp32 of hidden states [N, hidden], soft-capped where the model is.

        Complete on rank 0 only, which draws the tokens.
        """
        logits = self.head.logits(hidden)
        if self.config.logit_softcap is not None:
            cap_logits(logits, self.config.logit_softcap)
        return logits


def _storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """The bytes of what lies below them, each once, by its address."""
    found = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found}
