"""The one decoder: embed, then attention and feed-forward blocks with residuals, then norm.

What families differ in are fields of `ModelConfig`, read when layers are built.
"""

from collections.abc import Iterator

import torch

from minisgl.layers.attention import KV, Attention, AttentionSlices, ForwardInputs
from minisgl.layers.embedding import VocabTable
from minisgl.layers.mlp import Mlp, Moe
from minisgl.layers.norm import RMSNorm
from minisgl.layers.rotary import Rope
from minisgl.layers.weights import Placement, Weight
from minisgl.models.config import ModelConfig
from minisgl.trace import detail

# Rotary tables have this many more positions than the context, for drafts and a step in flight.
ROPE_SLACK = 256


class DecoderLayer:
    """x + attention(norm x), then x + feed_forward(norm x), each normalised after too in Gemma.

    The norm that follows a sum computes it too, so a layer takes and returns what has been added up
    (`residual`) and what is still to be added (`x`). A block's output is in parts, one on each
    rank; the norm that follows adds them up too.
    """

    def __init__(
        self, config: ModelConfig, index: int, cos_sin: torch.Tensor, at: Placement
    ) -> None:
        self.name = f"layer {index}"
        layer = config.layers[index]
        prefix = f"model.layers.{index}"
        names = config.family.norms

        def norm(name: str, size: int, of_parts: bool = False) -> RMSNorm:
            unit_offset, eps = config.family.norm_unit_offset, config.norm_eps
            return RMSNorm(f"{prefix}.{name}", size, eps, unit_offset, at, of_parts=of_parts)

        def hidden_norm(name: str | None) -> RMSNorm | None:
            return None if name is None else norm(name, config.hidden_size)

        qk_norm = None
        if config.family.qk_norm:
            qk_norm = (
                norm("self_attn.q_norm", config.head_dim),
                norm("self_attn.k_norm", config.head_dim),
            )
        self.comm = at.comm
        self.attention_norm = norm(names.attention, config.hidden_size, names.mlp_out is None)
        self.attention = Attention(
            f"{prefix}.self_attn",
            config.hidden_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            scale=config.attention_scale,
            window=layer.window,
            softcap=config.attention_softcap,
            qkv_bias=config.qkv_bias,
            out_bias=config.out_bias,
            qk_norm=qk_norm,
            cos_sin=cos_sin,
            at=at,
        )
        self.attention_out_norm = hidden_norm(names.attention_out)
        self.mlp_norm = norm(names.mlp, config.hidden_size, names.attention_out is None)
        self.mlp = _feed_forward(config, index, f"{prefix}.mlp", at)
        self.mlp_out_norm = hidden_norm(names.mlp_out)

    def weights(self) -> Iterator[Weight]:
        parts = (
            self.attention_norm,
            self.attention,
            self.attention_out_norm,
            self.mlp_norm,
            self.mlp,
            self.mlp_out_norm,
        )
        for part in parts:
            if part is not None:
                yield from part.weights()

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


def _feed_forward(config: ModelConfig, index: int, prefix: str, at: Placement) -> Mlp | Moe:
    moe = config.layers[index].moe
    if moe is None:
        return Mlp(
            prefix,
            config.hidden_size,
            config.inner_size,
            config.activation,
            bias=config.mlp_bias,
            at=at,
        )
    return Moe(
        prefix,
        config.hidden_size,
        moe.inner_size,
        moe.num_experts,
        moe.top_k,
        moe.renormalize,
        config.activation,
        at=at,
    )


class Decoder:
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
        self.layers = [
            DecoderLayer(config, index, tables[layer.rope], at)
            for index, layer in enumerate(config.layers)
        ]
        self.norm = RMSNorm(
            "model.norm",
            config.hidden_size,
            config.norm_eps,
            config.family.norm_unit_offset,
            at,
            of_parts=config.family.norms.mlp_out is None,
        )
        self.head = self.embedding
        if not config.tied_embeddings:
            self.head = VocabTable("lm_head", config.vocab_size, config.hidden_size, at)
        held = [weight.target for weight in self.weights()] + list(tables.values())
        storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in held}
        self.weight_bytes = sum(t.untyped_storage().nbytes() for t in storages.values())
        # Rounded to the dtype, as the models were trained.
        self.embedding_scale = None
        if config.embedding_scale is not None:
            self.embedding_scale = torch.tensor(config.embedding_scale, dtype=at.dtype).item()

    @property
    def num_kv_heads(self) -> int:
        """Key heads of this rank: what its KV pool holds."""
        return self.layers[0].attention.num_kv_heads

    def weights(self) -> Iterator[Weight]:
        """Every weight of this rank, by its name in a checkpoint of the Llama convention."""
        yield from self.embedding.weights()
        for layer in self.layers:
            yield from layer.weights()
        yield from self.norm.weights()
        if self.head is not self.embedding:
            yield from self.head.weights()

    def pack(self) -> None:
        """Put the weights of products into the form that their device reads fastest, once all are
        filled; `weights` has nothing to fill any more."""
        for layer in self.layers:
            layer.attention.pack()
            layer.mlp.pack()
        self.head.pack()

    @torch.inference_mode()
    def forward(self, inputs: ForwardInputs) -> torch.Tensor:
        """Hidden states [T, hidden] after the last norm; writes this step's KV."""
        x = self.embedding.embed(inputs.input_ids)
        if self.embedding_scale is not None:
            x = x * self.embedding_scale
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
            logits = torch.tanh(logits / self.config.logit_softcap) * self.config.logit_softcap
        return logits
