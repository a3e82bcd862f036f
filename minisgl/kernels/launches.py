"""What the engine launches, at the head counts and widths of the models it is for.

Each launch calls a launcher with empty tensors; under `lint.offline` that compiles its kernels
and stops. The list is what the compile gate covers; tiles come from `config`, as when serving.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from minisgl.kernels.activation.portable import (
    gelu_tanh_and_mul_portable,
    silu_and_mul_portable,
)
from minisgl.kernels.advance.portable import advance_rows_portable, prepare_inputs_portable
from minisgl.kernels.attention.hopper import attention_hopper
from minisgl.kernels.attention.portable import attention_portable
from minisgl.kernels.attention.tma import attention_tma
from minisgl.kernels.cascade.portable import cascade_portable
from minisgl.kernels.decode.portable import decode_portable
from minisgl.kernels.kv_copy.portable import copy_pages_portable, write_kv_portable
from minisgl.kernels.kv_staging.portable import gather_pages_portable, scatter_pages_portable
from minisgl.kernels.linear.persistent import linear_persistent
from minisgl.kernels.merge.portable import merge_portable
from minisgl.kernels.moe.portable import moe_experts_portable, moe_route_portable
from minisgl.kernels.qkv_prepare.portable import qkv_prepare_portable
from minisgl.kernels.rmsnorm.portable import rmsnorm_portable
from minisgl.kernels.rotary.portable import rotary_portable
from minisgl.kernels.sampling import PARAM_WORDS
from minisgl.kernels.sampling.logits import adjust_logits_portable, mask_logits_portable
from minisgl.kernels.sampling.portable import sample_portable

BF16 = torch.bfloat16
TOKENS = 48  # any size; no kernel depends on it


@dataclass(frozen=True)
class Model:
    """The shapes of a model's layers that kernels are compiled for."""

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    experts: int = 0
    top_k: int = 0


MODELS = (
    Model("llama-8b", 32, 8, 128, 4096, 14336),
    Model("qwen3-0.6b", 16, 8, 128, 1024, 3072),
    Model("qwen3-14b", 40, 8, 128, 5120, 17408),
    Model("qwen3-32b", 64, 8, 128, 5120, 25600),
    Model("qwen3-30b-a3b", 32, 4, 128, 2048, 768, experts=128, top_k=8),
)


@dataclass(frozen=True)
class Launch:
    """One call of a launcher, and what its machine code must show.

    `expected` are names of `lint.INSTRUCTIONS`, for every kernel of the launch; those of
    `on_hopper` only on sm_90, by kernel name.
    """

    label: str
    call: Callable[..., Any]
    arguments: dict[str, Any]
    expected: tuple[str, ...] = ()
    on_hopper: dict[str, tuple[str, ...]] | None = None
    only: tuple[int, ...] = ()  # architectures it is for; all when empty

    def archs(self, known: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(arch for arch in known if not self.only or arch in self.only)

    def run(self) -> None:
        self.call(**self.arguments)

    def expects(self, kernel: str, arch: int) -> tuple[str, ...]:
        hopper = (self.on_hopper or {}).get(kernel, ()) if arch == 90 else ()
        return self.expected + hopper


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def ints(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32)


def _rowwise(model: Model) -> Iterator[Launch]:
    x = empty(TOKENS, model.hidden)
    norm = {"x": x, "weight": empty(model.hidden), "eps": 1e-6}
    wide = ("load128", "store128")
    yield Launch(f"rmsnorm {model.name}", rmsnorm_portable, norm, wide)
    residual = norm | {"residual": empty(TOKENS, model.hidden)}
    yield Launch(f"rmsnorm-residual {model.name}", rmsnorm_portable, residual, wide)
    inner = {"x": empty(TOKENS, 2 * model.inner)}
    yield Launch(f"silu_and_mul {model.name}", silu_and_mul_portable, inner, wide)
    yield Launch(f"gelu_tanh_and_mul {model.name}", gelu_tanh_and_mul_portable, inner, wide)


def _heads(model: Model) -> Iterator[Launch]:
    tokens, q_heads, kv_heads, head_dim = TOKENS, model.q_heads, model.kv_heads, model.head_dim
    slots = 4096
    pool = empty(slots, kv_heads, head_dim)
    table = empty(4096, head_dim, dtype=torch.float32)
    prepare = {
        "qkv": empty(tokens, (q_heads + 2 * kv_heads) * head_dim),
        "positions": empty(tokens, dtype=torch.int64),
        "cos_sin": table,
        "k_pool": pool,
        "v_pool": pool,
        "slot_mapping": empty(tokens, dtype=torch.int64),
        "num_q_heads": q_heads,
    }
    weights = {"q_weight": empty(head_dim), "k_weight": empty(head_dim)}
    wide = ("load128", "store128")
    yield Launch(f"qkv_prepare {model.name}", qkv_prepare_portable, prepare, wide)
    yield Launch(f"qkv_prepare-norm {model.name}", qkv_prepare_portable, prepare | weights, wide)
    turned = {
        "q": empty(tokens, q_heads, head_dim),
        "k": empty(tokens, kv_heads, head_dim),
        "cos_sin": table,
        "positions": empty(tokens, dtype=torch.int64),
    }
    yield Launch(f"rotary {model.name}", rotary_portable, turned, wide)
    written = {
        "k": empty(tokens, kv_heads, head_dim),
        "v": empty(tokens, kv_heads, head_dim),
        "k_pool": pool,
        "v_pool": pool,
        "slot_mapping": empty(tokens, dtype=torch.int64),
    }
    yield Launch(f"write_kv {model.name}", write_kv_portable, written, wide)
    copied = {
        "storage": empty(2, 2, slots, kv_heads, head_dim),
        "jobs": ints(8, 3),
        "page_size": 16,
    }
    yield Launch(f"copy_pages {model.name}", copy_pages_portable, copied, wide)
    staged = {
        "storage": copied["storage"],
        "pages": ints(8),
        "staging": empty(8, 2, 2, 16, kv_heads, head_dim),
    }
    yield Launch(f"gather_pages {model.name}", gather_pages_portable, staged, wide)
    yield Launch(f"scatter_pages {model.name}", scatter_pages_portable, staged, wide)
    for states in (2, 8):
        merged = {
            "parts": empty(states, tokens, q_heads, head_dim, dtype=torch.float32),
            "lse": empty(states, tokens, q_heads, dtype=torch.float32),
            "out": empty(tokens, q_heads, head_dim),
        }
        yield Launch(f"merge-{states} {model.name}", merge_portable, merged, wide)


def _paged(
    sequences: int, tokens: int, page_size: int, heads: tuple[int, int, int], **facts: Any
) -> dict[str, Any]:
    q_heads, kv_heads, head_dim = heads
    pool = empty(16384, kv_heads, head_dim)
    return {
        "q": empty(tokens, q_heads, head_dim),
        "k_pool": pool,
        "v_pool": pool,
        "page_table": ints(256, 8192 // page_size),
        "rows": ints(sequences),
        "seq_lens": ints(sequences),
        "page_size": page_size,
        "scale": head_dim**-0.5,
    } | facts


def _attention() -> Iterator[Launch]:
    wgmma = {"attention_kernel": ("wgmma",)}
    gemma = {"window": 1024, "softcap": 50.0}
    shapes: list[tuple[str, tuple[int, int, int], int, dict[str, Any]]] = [
        ("gqa4-d128-page16", (32, 8, 128), 16, {}),
        ("gqa2-d256-gemma-page16", (8, 4, 256), 16, gemma),
        ("mha-d64-page16", (8, 8, 64), 16, {}),
        # Below, what differs from the first only in addressing, on one architecture.
        ("gqa4-d128-page1", (32, 8, 128), 1, {}),
        ("gqa4-d128-page64", (32, 8, 128), 64, {}),
        ("gqa5-d128-page16", (40, 8, 128), 16, {}),
        ("gqa8-d128-page16", (32, 4, 128), 16, {}),
        ("gqa2-d80-page16", (8, 4, 80), 16, {}),
        ("gqa2-d96-page16", (8, 4, 96), 16, {}),
    ]
    for index, (label, heads, page_size, facts) in enumerate(shapes):
        only = () if index < 3 else (90,)
        chunk = _paged(4, 512, page_size, heads, **facts)
        chunk |= {"cu_seqlens_q": ints(5), "max_seqlen_q": 512}
        yield Launch(
            f"attention {label}", attention_portable, chunk, ("load128",), wgmma, only=only
        )
        one = _paged(256, 256, page_size, heads, **facts)
        yield Launch(f"decode {label}", decode_portable, one, ("load128",), only=only)
    heads = (32, 8, 128)
    few = _paged(4, 4, 16, heads)
    yield Launch("decode-split gqa4-d128-page16", decode_portable, few, ("load128",))
    drafts = _paged(4, 16, 16, heads, width=4)
    yield Launch("decode-width4 gqa4-d128-page16", decode_portable, drafts, ("load128",))
    for page_size in (16, 64):
        chunk = _paged(4, 512, page_size, heads, cu_seqlens_q=ints(5), max_seqlen_q=512)
        label = f"gqa4-d128-page{page_size}"
        tma = {"attention_kernel": ("wgmma", "tma")}
        yield Launch(f"attention-tma {label}", attention_tma, chunk, on_hopper=tma, only=(90,))
        specialised = {"attention_hopper_kernel": ("wgmma", "tma", "set_registers")}
        yield Launch(
            f"attention-hopper {label}", attention_hopper, chunk, on_hopper=specialised, only=(90,)
        )
    grouped = _paged(64, 64, 16, heads, groups=ints(4, 3), shared=ints(64))
    prefix = {"prefix_kernel": ("wgmma",)}
    yield Launch("cascade gqa4-d128-page16", cascade_portable, grouped, ("load128",), prefix)


def _sampling() -> Iterator[Launch]:
    count, vocab, table_rows = 256, 151936, 320
    rows = {"rows": ints(count), "positions": empty(count, dtype=torch.int64)}
    logits = empty(count, vocab, dtype=torch.float32)
    params = ints(table_rows, PARAM_WORDS)
    sampled = {"logits": logits, **rows, "params": params}
    yield Launch("sample", sample_portable, sampled)
    adjusted = sampled | {
        "bias_ids": ints(table_rows, 1024),
        "bias_values": empty(table_rows, 1024, dtype=torch.float32),
        "counts": ints(table_rows, vocab),
        "drafts": ints(count, 4),
    }
    yield Launch("adjust_logits", adjust_logits_portable, adjusted)
    masked = {"logits": logits, "indices": ints(count), "bits": ints(count, vocab // 32)}
    yield Launch("mask_logits", mask_logits_portable, masked)


def _linear() -> Iterator[Launch]:
    wgmma = {"linear_kernel": ("wgmma",)}
    for outputs, inputs in ((6144, 4096), (1024, 3072)):
        product = {"x": empty(TOKENS, inputs), "weight": empty(outputs, inputs)}
        label = f"linear-persistent n{outputs} k{inputs}"
        yield Launch(label, linear_persistent, product, ("load128",), wgmma)


def _experts(model: Model) -> Iterator[Launch]:
    experts, top_k = model.experts, model.top_k
    for name, tokens in (("few", 32), ("many", 2048)):
        call = {
            "x": empty(tokens, model.hidden),
            "gate_up": empty(experts, 2 * model.inner, model.hidden),
            "down": empty(experts, model.hidden, model.inner),
            "weights": empty(tokens, top_k, dtype=torch.float32),
            "ids": ints(tokens, top_k),
        }
        wgmma = {"experts_kernel": ("wgmma",)} if name == "many" else None
        label = f"moe_experts-{name} {model.name}"
        yield Launch(label, moe_experts_portable, call, on_hopper=wgmma)
    routed = {"logits": empty(TOKENS, experts), "top_k": top_k, "renormalize": True}
    yield Launch(f"moe_route {model.name}", moe_route_portable, routed)


def _advance() -> Iterator[Launch]:
    tokens, count, table_rows = 512, 256, 320
    prepared = {
        "input_ids": ints(tokens),
        "positions": empty(tokens, dtype=torch.int64),
        "slot_mapping": empty(tokens, dtype=torch.int64),
        "seq_lens": ints(count),
        "token_ids": ints(tokens),
        "sequences": ints(tokens),
        "offsets": ints(count + 1),
        "rows": ints(count),
        "starts": ints(count),
        "num_tokens": ints(count),
        "last": ints(table_rows),
        "lengths": ints(table_rows),
        "page_table": ints(table_rows, 512),
        "page_size": 16,
    }
    yield Launch("prepare_inputs", prepare_inputs_portable, prepared)
    advanced = {
        "tokens": ints(tokens),
        "first": ints(count),
        "rows": ints(count),
        "drafts": ints(count, 4),
        "positions": empty(tokens, dtype=torch.int64),
        "last": ints(table_rows),
        "lengths": ints(table_rows),
        "counts": ints(table_rows, 151936),
        "counted": ints(table_rows),
    }
    yield Launch("advance_rows", advance_rows_portable, advanced)


def launches() -> Iterator[Launch]:
    """Everything the compile gate covers."""
    for model in (MODELS[0], MODELS[2]):
        yield from _rowwise(model)
    yield from _heads(MODELS[0])
    yield from _attention()
    yield from _sampling()
    yield from _advance()
    yield from _linear()
    yield from _experts(MODELS[4])
