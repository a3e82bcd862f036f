"""The bytes needed beside KV: weights, buffers, activations, logits, graphs.

They are found before anything large is allocated. Weights and buffers, which are held, are exact;
the others are upper bounds. What capturing graphs really took is measured afterwards, and logged.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minisgl import csrc
from minisgl.kernels.attention.cpu import BLOCK
from minisgl.libraries import PRODUCT_BYTES, PRODUCTS_KEPT
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.start.facts import Facts
from minisgl.step.draft import FIRST_WIDTH, GRAPHS_PER_SIZE, Draft
from minisgl.step.sampler import scored_at_once
from minisgl.step.sizes import GraphSizes, draft_sizes

# The most tokens of a pool on a CPU, whose memory others use too, unless its size is stated.
MODEST_TOKENS = 262_144
# A captured kernel's launch, in the driver and on the device; a guess until it is measured.
NODE_BYTES = 16 * 2**10
CALL_BYTES = 256  # a recorded call of a tape
NODES_PER_LAYER = 14
OTHER_NODES = 40  # of the passes' ends, and of the three sampling halves


@dataclass(frozen=True)
class Footprint:
    """What a rank allocates beside KV, in bytes by purpose."""

    weights: int  # rotary tables included
    buffers: int  # of rows (page table, counts of tokens), and what graphs share
    workspace: int
    logits: int
    graphs: int

    @property
    def total(self) -> int:
        return self.weights + self.buffers + self.workspace + self.logits + self.graphs


def footprint(
    facts: Facts, model: Decoder, draft: Draft | None, ranks: int, buffers: int, *, captures: bool
) -> Footprint:
    """The footprint of a rank with its share `model`. buffers: bytes that its worker allocates
    beside KV; captures: whether graphs are captured."""
    config, sizes, vocab = facts.config, facts.graphs, facts.model.vocab_size
    rows = config.max_running_requests
    points = rows * (1 + config.num_draft_tokens)  # of every row, with its drafts
    tokens = config.chunked_prefill_size + points
    weights = model.weight_bytes
    workspace = workspace_bytes(facts.model, tokens, facts.dtype, ranks)
    graphs = pieces_bytes(sizes, facts.model, facts.dtype, ranks)
    graphs += decode_bytes(sizes, facts.model, facts.dtype, ranks, facts.cascade, captures)
    if not captures:
        workspace += PRODUCTS_KEPT * PRODUCT_BYTES
    ops = csrc.load("model_ops") if facts.dtype == torch.bfloat16 else None
    if not captures and (ops is None or facts.model.head_dim not in ops.HEAD_DIMS):
        longest = min(facts.max_context, config.max_total_tokens or MODEST_TOKENS)
        workspace += attention_bytes(facts.model, longest, facts.dtype, ranks)
    if draft is not None:  # which computes before the target, never beside it
        weights += 0 if draft.model is None else draft.model.weight_bytes
        workspace = max(workspace, draft_workspace_bytes(draft, tokens))
        passes = draft_sizes(rows, any_size=not captures)
        captured = captures and bool(sizes.by_width)
        graphs += draft_graph_bytes(draft, passes) if captured else 0
    scored = min(scored_at_once(vocab), config.chunked_prefill_size)
    logits = logits_bytes(vocab, max(points, scored))
    return Footprint(weights, buffers, workspace, logits, graphs)


def decode_bytes(
    sizes: GraphSizes,
    model: ModelConfig,
    dtype: torch.dtype,
    ranks: int,
    cascade: bool,
    captures: bool,
) -> int:
    """Of the decode graphs themselves: activations and logits of the largest, the launches of all,
    and hidden states: of each graph, but of a CPU's tapes, in one arena, of the largest of a width.

    With `cascade` there is a forward pass more for each, with two launches more per layer.
    """
    most, count = sizes.max_tokens, sum(map(len, sizes.by_width.values()))
    nodes = model.num_layers * NODES_PER_LAYER + OTHER_NODES
    if cascade:
        nodes += model.num_layers * (NODES_PER_LAYER + 2)
    tokens = len(sizes.by_width) * most
    if captures:
        tokens = sum(width * sum(own) for width, own in sizes.by_width.items())
    return (
        workspace_bytes(model, most, dtype, ranks)
        + 2 * most * model.vocab_size * 4
        + tokens * model.hidden_size * dtype.itemsize
        + count * nodes * (NODE_BYTES if captures else CALL_BYTES)
    )


def pieces_bytes(sizes: GraphSizes, model: ModelConfig, dtype: torch.dtype, ranks: int) -> int:
    """Of the piecewise graphs: what they share, activations of the largest, their launches."""
    if not sizes.pieces:
        return 0
    most, heads = sizes.pieces[-1], 2 * model.num_heads * model.head_dim // ranks
    nodes = len(sizes.pieces) * (model.num_layers * NODES_PER_LAYER + OTHER_NODES)
    return (
        most * (heads + model.hidden_size) * dtype.itemsize
        + workspace_bytes(model, most, dtype, ranks)
        + nodes * NODE_BYTES
    )


def workspace_bytes(model: ModelConfig, tokens: int, dtype: torch.dtype, ranks: int) -> int:
    """Activations that live at once in one layer: residual, normed, qkv and attention, gate-up."""
    heads = (2 * model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    inner = max(
        model.inner_size,
        *((layer.moe.inner_size * layer.moe.top_k) if layer.moe else 0 for layer in model.layers),
    )
    per_token = 4 * model.hidden_size + (heads + 3 * inner) // ranks
    return tokens * per_token * dtype.itemsize


def attention_bytes(model: ModelConfig, tokens: int, dtype: torch.dtype, ranks: int) -> int:
    """Of a CPU's attention to a prompt of so many tokens, where it is not native: a block's scores
    twice and its mask, the slots twice, keys and values, gathered and one of them widened."""
    scores = 2 * BLOCK * model.num_heads * 4 // ranks
    pairs = model.num_kv_heads * model.head_dim * (2 * dtype.itemsize + 4)
    return tokens * (scores + BLOCK + 2 * 8 + pairs)


def logits_bytes(vocab: int, rows: int) -> int:
    """Logits in fp32 and three temporaries of the sampler of that size."""
    return 4 * rows * vocab * 4


def draft_workspace_bytes(draft: Draft, tokens: int) -> int:
    """Activations of the draft model while it computes that many tokens."""
    if draft.model is None or draft.shape is None:
        return 0
    return workspace_bytes(draft.model.config, tokens, draft.shape.dtype, 1)


def draft_graph_bytes(draft: Draft, sizes: Sequence[int]) -> int:
    """Of the graphs that a `DraftRunner` captures for these numbers of rows: activations and logits
    of the largest pass, and the launches of all."""
    if draft.model is None:
        return 0
    most, model = sizes[-1], draft.model.config
    nodes = model.num_layers * NODES_PER_LAYER + OTHER_NODES
    logits = 2 * most * model.vocab_size * 4
    launches = GRAPHS_PER_SIZE * len(sizes) * nodes * NODE_BYTES
    return draft_workspace_bytes(draft, FIRST_WIDTH * most) + logits + launches
