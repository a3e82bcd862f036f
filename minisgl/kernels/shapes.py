"""Facts of a model and of an engine that decide which kernels are compiled. Imports no Triton."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ModelShapes:
    """One rank's share of a model, as its kernels see it."""

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    num_layers: int
    dtype: str = "bfloat16"
    inner: int = 0  # of dense feed-forward blocks; 0 = there are none
    experts: int = 0
    top_k: int = 0
    expert_inner: int = 0
    renormalize: bool = True
    rotary_dims: tuple[int, ...] = ()  # as many as there are kinds of tables; the head if empty
    windows: tuple[int | None, ...] = (None,)  # as many as there are kinds of layers
    softcap: bool = False  # of attention scores
    attention: str = "portable"  # the implementation that computes prompts
    qk_norm: bool = False
    unit_offset: bool = False
    activation: str = "silu"
    logits_stride: int = 0  # between rows of the logits; 0 = vocab
    products: tuple[tuple[int, int, bool, bool], ...] = ()  # (outputs, inputs, bias, wide)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class EngineShapes:
    """Limits of an engine that its launches depend on."""

    page_size: int
    num_pages: int  # of the KV pool
    max_pages: int  # of a sequence: the page table's width
    max_rows: int  # sequences running at once
    max_drafts: int = 0  # of a sequence in a step
    widths: tuple[int, ...] = ()  # tokens of a sequence in a decode step; 1 + any drafts if empty
    batch_invariant: bool = False
    cascade: bool = False

    @property
    def decode_widths(self) -> tuple[int, ...]:
        return self.widths or tuple(range(1, 2 + self.max_drafts))
