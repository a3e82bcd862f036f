"""A loaded model as its kernels see it, for warm-up to know what to compile."""

from collections.abc import Iterator

import torch

from minisgl.kernels.shapes import ModelShapes
from minisgl.layers.linear import ColumnLinear, RowLinear
from minisgl.layers.mlp import Mlp, Moe
from minisgl.models.decoder import Decoder


def model_shapes(decoder: Decoder) -> ModelShapes:
    """The shapes of this rank's share of `decoder`, whose layers' feed-forward blocks of a kind
    are alike."""
    config, layers = decoder.config, decoder.layers
    attention, head = layers[0].attention, decoder.head
    mlps = [layer.mlp for layer in layers]
    dense = next((mlp for mlp in mlps if isinstance(mlp, Mlp)), None)
    sparse = next((mlp for mlp in mlps if isinstance(mlp, Moe)), None)
    # A soft cap makes new, dense logits of what rank 0 has gathered.
    capped = config.logit_softcap is not None
    windows = dict.fromkeys(layer.attention.window for layer in layers)
    return ModelShapes(
        name=config.architecture,
        q_heads=attention.num_heads,
        kv_heads=attention.num_kv_heads,
        head_dim=config.head_dim,
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        num_layers=len(layers),
        dtype=str(head.weight.dtype).removeprefix("torch."),
        inner=0 if dense is None else dense.down.weight.shape[1],
        experts=0 if sparse is None else sparse.router.shape[0],
        top_k=0 if sparse is None else sparse.top_k,
        expert_inner=0 if sparse is None else sparse.down.shape[2],
        renormalize=sparse is not None and sparse.renormalize,
        rotary_dims=tuple(dict.fromkeys(layer.attention.cos_sin.shape[1] for layer in layers)),
        windows=tuple(windows),
        softcap=config.attention_softcap is not None,
        attention=next(i.name for i in attention.attention.implementations if i.device == "cuda"),
        qk_norm=attention.qk_norm is not None,
        unit_offset=config.family.norm_unit_offset,
        activation=config.activation,
        logits_stride=0 if capped else head.weight.shape[0] * head.comm.size,
        products=tuple(dict.fromkeys(_products(decoder))),
    )


def _products(decoder: Decoder) -> Iterator[tuple[int, int, bool, bool]]:
    """(outputs, inputs, bias, wide) of every matrix product."""
    for layer in decoder.layers:
        yield _product(layer.attention.qkv)
        yield _product(layer.attention.out)
        if isinstance(layer.mlp, Mlp):
            yield _product(layer.mlp.gate_up)
            yield _product(layer.mlp.down)
        else:
            yield *_sizes(layer.mlp.router), False, False
    yield *_sizes(decoder.head.weight), False, True


def _product(layer: ColumnLinear | RowLinear) -> tuple[int, int, bool, bool]:
    # Rank 0 alone adds the bias to the parts of a sum.
    skipped = isinstance(layer, RowLinear) and layer.comm.rank > 0
    return *_sizes(layer.weight), layer.bias is not None and not skipped, False


def _sizes(weight: torch.Tensor) -> tuple[int, int]:
    outputs, inputs = weight.shape
    return outputs, inputs
