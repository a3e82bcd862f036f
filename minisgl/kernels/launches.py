"""The launches of Triton kernels that serving a model can need, from its shapes and the limits.

`serving_launches` is what warm-up compiles before the engine is ready, and what the compile gate
walks for the models of `gate`. A kernel is compiled anew for every type, constant and divisibility
of its arguments, so these arguments have the shapes and strides of serving; they are tensors
without memory, which a launch under `offline` never reads. What varies from step to step is either
a size that no kernel depends on, or listed here: decode's runs by the number of sequences, and
what follows the number of drafts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from minisgl.kernels.activation.portable import (
    gelu_tanh_and_mul_portable,
    silu_and_mul_portable,
)
from minisgl.kernels.advance.portable import advance_rows_portable, prepare_inputs_portable
from minisgl.kernels.attention import attention
from minisgl.kernels.attention.paged import PagedKV
from minisgl.kernels.cascade.portable import cascade_portable, cascade_splits
from minisgl.kernels.config import Architecture, fixed_order
from minisgl.kernels.decode.portable import decode_portable, decode_splits
from minisgl.kernels.kv_copy.portable import copy_pages_portable
from minisgl.kernels.linear.persistent import linear_persistent
from minisgl.kernels.logprobs.portable import logprobs_portable
from minisgl.kernels.moe.portable import moe_experts_portable, moe_route_portable
from minisgl.kernels.qkv_prepare.portable import qkv_prepare_portable
from minisgl.kernels.rmsnorm.portable import rmsnorm_portable
from minisgl.kernels.sampling import MAX_BIASES, PARAM_WORDS
from minisgl.kernels.sampling.logits import adjust_logits_portable, mask_logits_portable
from minisgl.kernels.sampling.portable import sample_portable
from minisgl.kernels.shapes import EngineShapes, ModelShapes

TOKENS = 48  # of a step: any number, no kernel depends on it
WIDE = ("load128", "store128")


@dataclass(frozen=True)
class Launch:
    """One call of a launcher, and what its machine code must show.

    `expected` are names of `lint.INSTRUCTIONS`, for every kernel of the launch; those of
    `of_kernel` by kernel name, and of `on_hopper` on sm_90 alone.
    """

    label: str  # the op, a variant after "-", the model and what else tells it from others
    call: Callable[..., Any]
    arguments: dict[str, Any]
    expected: tuple[str, ...] = ()
    of_kernel: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    on_hopper: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    in_fixed_order: bool = False

    def run(self) -> None:
        if self.in_fixed_order:
            with fixed_order():
                self.call(**self.arguments)
        else:
            self.call(**self.arguments)

    def expects(self, kernel: str, arch: int) -> tuple[str, ...]:
        hopper = self.on_hopper.get(kernel, ()) if arch == 90 else ()
        return self.expected + self.of_kernel.get(kernel, ()) + hopper


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int32)


def longs(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.int64)


def floats(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.float32)


def serving_launches(
    model: ModelShapes, engine: EngineShapes, arch: Architecture
) -> Iterator[Launch]:
    """Every launch that serving `model` within `engine`'s limits can need, labels unique."""
    counts = range(1, engine.max_rows + 8)  # graphs are padded, to multiples of 8 at most
    yield from rowwise(model)
    yield from heads(model, engine)
    for window in model.windows:
        yield chunks(model, engine, window)
        yield from decodes(model, engine, arch, window, counts)
    if engine.cascade and None in model.windows:
        yield from cascades(model, engine, arch, counts)
    if model.experts:
        yield from experts(model, engine)
    if engine.batch_invariant:
        yield from products(model)
    yield from sampling(model, engine)
    yield from rows(model, engine)


def rowwise(model: ModelShapes) -> Iterator[Launch]:
    """Norms of hidden states, alone and with the residual, and the feed-forward activation."""
    dtype = model.torch_dtype
    x = empty(TOKENS, model.hidden, dtype=dtype)
    norm = {
        "x": x,
        "weight": empty(model.hidden, dtype=dtype),
        "eps": 1e-6,
        "unit_offset": model.unit_offset,
    }
    yield Launch(f"rmsnorm {model.name}", rmsnorm_portable, norm, WIDE)
    residual = norm | {"residual": x}
    yield Launch(f"rmsnorm-residual {model.name}", rmsnorm_portable, residual, WIDE)
    if model.inner:
        silu = model.activation == "silu"
        op = "silu_and_mul" if silu else "gelu_tanh_and_mul"
        launcher = silu_and_mul_portable if silu else gelu_tanh_and_mul_portable
        inner = {"x": empty(TOKENS, 2 * model.inner, dtype=dtype)}
        yield Launch(f"{op} {model.name}", launcher, inner, WIDE)


def pools(model: ModelShapes, engine: EngineShapes) -> torch.Tensor:
    """[L, 2, slots, Hkv, D]"""
    slots = engine.num_pages * engine.page_size
    shape = (model.num_layers, 2, slots, model.kv_heads, model.head_dim)
    return empty(*shape, dtype=model.torch_dtype)


def heads(model: ModelShapes, engine: EngineShapes) -> Iterator[Launch]:
    """What is between projection and attention, and the copy of pages."""
    dtype, head_dim = model.torch_dtype, model.head_dim
    storage = pools(model, engine)
    weight = empty(head_dim, dtype=dtype) if model.qk_norm else None
    for rotary_dim in model.rotary_dims or (head_dim,):
        width = (model.q_heads + 2 * model.kv_heads) * head_dim
        prepare = {
            "qkv": empty(TOKENS, width, dtype=dtype),
            "positions": longs(TOKENS),
            "cos_sin": floats(4096, rotary_dim),
            "k_pool": storage[0, 0],
            "v_pool": storage[0, 1],
            "slot_mapping": longs(TOKENS),
            "num_q_heads": model.q_heads,
            "q_weight": weight,
            "k_weight": weight,
            "unit_offset": model.unit_offset and model.qk_norm,
        }
        variant = "-norm" if model.qk_norm else ""
        label = f"qkv_prepare{variant} {model.name} rotary {rotary_dim}"
        # Heads in halves that are no power of two leave lanes idle and may load less at once.
        wide = WIDE if rotary_dim == head_dim and head_dim in (64, 128, 256) else ()
        yield Launch(label, qkv_prepare_portable, prepare, wide)
    copied = {"storage": storage, "jobs": ints(8, 3), "page_size": engine.page_size}
    yield Launch(f"copy_pages {model.name}", copy_pages_portable, copied, WIDE)


def paged(
    model: ModelShapes,
    engine: EngineShapes,
    count: int,
    tokens: int,
    window: int | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Arguments of a paged attention of `count` sequences with `tokens` queries together."""
    storage = pools(model, engine)
    kv = PagedKV(
        k_pool=storage[0, 0],
        v_pool=storage[0, 1],
        page_table=ints(engine.max_rows + 1, engine.max_pages),
        rows=ints(count),
        seq_lens=ints(count),
        page_size=engine.page_size,
        scale=model.head_dim**-0.5,
        window=window,
        softcap=50.0 if model.softcap else None,
    )
    q = empty(tokens, model.q_heads, model.head_dim, dtype=model.torch_dtype)
    return {"q": q, "kv": kv} | facts


def _where(model: ModelShapes, engine: EngineShapes, window: int | None = None) -> str:
    return f"{model.name} page{engine.page_size}" + (f" window{window}" if window else "")


def chunks(model: ModelShapes, engine: EngineShapes, window: int | None, **facts: Any) -> Launch:
    call = paged(model, engine, 4, 512, window=window, **facts)
    call |= {"cu_seqlens_q": ints(5), "max_seqlen_q": 512}
    wgmma = {} if model.dtype == "float32" else {"attention_kernel": ("wgmma",)}
    label = f"attention {_where(model, engine, window)}"
    launcher = attention.implementation(model.attention)
    return Launch(label, launcher, call, ("load128",), on_hopper=wgmma)


def decodes(
    model: ModelShapes,
    engine: EngineShapes,
    arch: Architecture,
    window: int | None,
    counts: Iterable[int],
) -> Iterator[Launch]:
    """A launch per width and number of runs that `counts` of sequences lead to; in a fixed order
    there are no runs."""
    max_keys = engine.max_pages * engine.page_size
    sizes = (model.kv_heads, model.head_dim, max_keys, model.torch_dtype)
    for width in engine.decode_widths:
        label = f"decode-width{width} {_where(model, engine, window)}"
        if engine.batch_invariant:
            call = paged(model, engine, 1, width, width=width, window=window)
            yield Launch(
                f"{label} fixed order", decode_portable, call, ("load128",), in_fixed_order=True
            )
            continue
        first: dict[int, int] = {}
        for count in counts:
            splits = decode_splits(arch, count, *sizes)
            first.setdefault(splits, count)
        for splits, count in first.items():
            call = paged(model, engine, count, count * width, width=width, window=window)
            yield Launch(f"{label} runs{splits}", decode_portable, call, ("load128",))


def cascades(
    model: ModelShapes, engine: EngineShapes, arch: Architecture, counts: Iterable[int]
) -> Iterator[Launch]:
    """A launch per width and numbers of runs that `counts` of sequences lead to."""
    max_keys = engine.max_pages * engine.page_size
    prefix = {"prefix_kernel": ("wgmma",)}
    for width in engine.decode_widths:
        first: dict[tuple[int, int], dict[str, Any]] = {}
        for count in counts:
            call = paged(model, engine, count, count * width, width=width)
            call |= {"groups": ints(4, 3), "shared": ints(count)}
            splits = cascade_splits(arch, call["q"], model.kv_heads, count, max_keys)
            first.setdefault(splits, call)
        for splits, call in first.items():
            label = f"cascade-width{width} {_where(model, engine)} runs{splits[0]}+{splits[1]}"
            yield Launch(label, cascade_portable, call, ("load128",), on_hopper=prefix)


def experts(model: ModelShapes, engine: EngineShapes) -> Iterator[Launch]:
    """Routing, and experts with few tokens each and with many."""
    dtype = model.torch_dtype
    number, top_k, inner = model.experts, model.top_k, model.expert_inner
    for name, tokens in (("few", 1), ("many", 17 * number)):
        if name == "few" and engine.batch_invariant:
            continue
        call = {
            "x": empty(tokens, model.hidden, dtype=dtype),
            "gate_up": empty(number, 2 * inner, model.hidden, dtype=dtype),
            "down": empty(number, model.hidden, inner, dtype=dtype),
            "weights": floats(tokens, top_k),
            "ids": ints(tokens, top_k),
            "activation": model.activation,
        }
        wgmma = {"experts_kernel": ("wgmma",)} if name == "many" else {}
        label = f"moe_experts-{name} {model.name}"
        loads = {"experts_kernel": ("load128",)}
        yield Launch(label, moe_experts_portable, call, of_kernel=loads, on_hopper=wgmma)
    logits = empty(TOKENS, number, dtype=dtype)
    routed = {"logits": logits, "top_k": top_k, "renormalize": model.renormalize}
    yield Launch(f"moe_route {model.name}", moe_route_portable, routed)


def products(model: ModelShapes) -> Iterator[Launch]:
    """The matrix products that are ours in a fixed order, cuBLAS's otherwise."""
    dtype = model.torch_dtype
    wgmma = {"linear_kernel": ("wgmma",)}
    for outputs, inputs, bias, wide in model.products:
        call = {
            "x": empty(TOKENS, inputs, dtype=dtype),
            "weight": empty(outputs, inputs, dtype=dtype),
            "bias": empty(outputs, dtype=dtype) if bias else None,
            "wide": wide,
        }
        marks = " bias" * bias + " wide" * wide
        label = f"linear-persistent {model.name} n{outputs} k{inputs}{marks}"
        yield Launch(label, linear_persistent, call, ("load128",), on_hopper=wgmma)


def sampling(model: ModelShapes, engine: EngineShapes) -> Iterator[Launch]:
    count, table_rows, vocab = 8, engine.max_rows + 1, model.vocab
    logits = floats(count, model.logits_stride or vocab)[:, :vocab]
    sampled = {
        "logits": logits,
        "rows": ints(count),
        "positions": longs(count),
        "params": ints(table_rows, PARAM_WORDS),
    }
    aligned = logits.stride(0) % 4 == 0
    wide = dict.fromkeys(("scan_kernel", "collect_kernel"), ("load128",) * aligned)
    yield Launch(f"sample {model.name}", sample_portable, sampled, of_kernel=wide)
    for drafts in range(engine.max_drafts + 1):
        adjusted = sampled | {
            "bias_ids": ints(table_rows, MAX_BIASES),
            "bias_values": floats(table_rows, MAX_BIASES),
            "counts": ints(table_rows, vocab),
            "drafts": ints(count, drafts),
        }
        label = f"adjust_logits-drafts{drafts} {model.name}"
        yield Launch(label, adjust_logits_portable, adjusted)
    for stride in sorted({vocab, model.logits_stride or vocab}):  # some rows, or all as they come
        scored = {
            "logits": floats(count, stride)[:, :vocab],
            "token_ids": ints(count),
            "num_top": 3,
        }
        wide = {"piece_kernel": ("load128",) * (stride % 4 == 0)}
        label = f"logprobs {model.name}" + f" stride{stride}" * (stride != vocab)
        yield Launch(label, logprobs_portable, scored, of_kernel=wide)
    masked = {"logits": logits, "indices": ints(count), "bits": ints(count, -(-vocab // 32))}
    yield Launch(f"mask_logits {model.name}", mask_logits_portable, masked)


def rows(model: ModelShapes, engine: EngineShapes) -> Iterator[Launch]:
    """A step's inputs from the rows, and the rows moved on by its tokens."""
    tokens, count, table_rows = TOKENS, 8, engine.max_rows + 1
    prepared = {
        "input_ids": ints(tokens),
        "positions": longs(tokens),
        "slot_mapping": longs(tokens),
        "seq_lens": ints(count),
        "token_ids": ints(tokens),
        "sequences": ints(tokens),
        "offsets": ints(count + 1),
        "rows": ints(count),
        "starts": ints(count),
        "num_tokens": ints(count),
        "last": ints(table_rows),
        "lengths": ints(table_rows),
        "page_table": ints(table_rows, engine.max_pages),
        "page_size": engine.page_size,
    }
    yield Launch(f"prepare_inputs {_where(model, engine)}", prepare_inputs_portable, prepared)
    for drafts in range(engine.max_drafts + 1):
        advanced = {
            "tokens": ints(tokens),
            "first": ints(count),
            "rows": ints(count),
            "drafts": ints(count, drafts),
            "positions": longs(tokens),
            "last": ints(table_rows),
            "lengths": ints(table_rows),
            "counts": ints(table_rows, model.vocab),
            "counted": ints(table_rows),
        }
        label = f"advance_rows-drafts{drafts} {model.name}"
        yield Launch(label, advance_rows_portable, advanced)
