"""What is timed: every op at the shapes models use it with, and what a user would pick instead."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.kernels import baselines
from minisgl.kernels.activation import silu_and_mul
from minisgl.kernels.attention import attention
from minisgl.kernels.decode import decode
from minisgl.kernels.kv_copy import copy_pages, write_kv
from minisgl.kernels.linear import linear
from minisgl.kernels.merge import merge
from minisgl.kernels.moe import moe_experts
from minisgl.kernels.op import Op
from minisgl.kernels.qkv_prepare import qkv_prepare
from minisgl.kernels.rmsnorm import rmsnorm
from minisgl.kernels.sampling import make_params, sample

Arguments = dict[str, Any]
Make = Callable[["Setting"], Arguments]


@dataclass(frozen=True)
class Shape:
    """The facts of a model that its kernels see."""

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    inner: int
    vocab: int
    qk_norm: bool = True


LLAMA_8B = Shape("Llama-3.1-8B", 32, 8, 128, 4096, 14336, 128256, qk_norm=False)
QWEN3_06B = Shape("Qwen3-0.6B", 16, 8, 128, 1024, 3072, 151936)
QWEN3_8B = Shape("Qwen3-8B", 32, 8, 128, 4096, 12288, 151936)
QWEN3_14B = Shape("Qwen3-14B", 40, 8, 128, 5120, 17408, 151936)
QWEN3_32B = Shape("Qwen3-32B", 64, 8, 128, 5120, 25600, 151936)
QWEN3_30B_A3B = Shape("Qwen3-30B-A3B", 32, 4, 128, 2048, 768, 151936)
EXPERTS, EXPERTS_PER_TOKEN = 128, 8  # of Qwen3-30B-A3B


@dataclass(frozen=True)
class Setting:
    """Where and in which type arguments are made."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *size: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(*size, generator=self.generator, device=self.device, dtype=self.dtype)
        return values * scale


@dataclass(frozen=True)
class Workload:
    """One op at one shape. `tags` are numbers that goals are stated in."""

    op: Op
    label: str
    make: Make
    rivals: dict[str, baselines.Baseline] = field(default_factory=dict)
    tags: dict[str, Any] = field(default_factory=dict)
    num_bytes: int | None = None  # where the card's cost formula cannot know


def workloads(*, small: bool) -> Iterator[Workload]:
    """All of them; `small` ones end in seconds on a CPU."""
    yield from _decodes(small)
    yield from _prefills(small)
    yield from _merges(small)
    yield from _elementwise(small)
    yield from _copies(small)
    yield from _samples(small)
    yield from _products(small)


# ---- attention ------------------------------------------------------------------------------


def paged(
    setting: Setting,
    shape: Shape,
    queries: list[int],
    lengths: list[int],
    *,
    page_size: int,
    shuffled: bool = True,
) -> Arguments:
    """q [T, Hq, D] and KV pages of sequences; shuffled pages are what a busy pool looks like."""
    device, generator = setting.device, setting.generator
    counts = [-(-length // page_size) for length in lengths]
    total = sum(counts)
    pages = torch.arange(total, device=device)
    if shuffled:
        pages = torch.randperm(total, generator=generator, device=device)
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32, device=device)
    for row, own in enumerate(pages.split(counts)):
        table[row, : len(own)] = own
    slots = total * page_size
    return {
        "q": setting.normal(sum(queries), shape.q_heads, shape.head_dim),
        "k_pool": setting.normal(slots, shape.kv_heads, shape.head_dim),
        "v_pool": setting.normal(slots, shape.kv_heads, shape.head_dim),
        "page_table": table,
        "rows": torch.arange(len(lengths), dtype=torch.int32, device=device),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32, device=device),
        "page_size": page_size,
        "scale": shape.head_dim**-0.5,
        "window": None,
    }


def _decode(
    shape: Shape, batch: int, context: int, page_size: int = 16, width: int = 1
) -> Workload:
    def make(setting: Setting) -> Arguments:
        queries, lengths = [width] * batch, [context] * batch
        return paged(setting, shape, queries, lengths, page_size=page_size) | {"width": width}

    kv_bytes = 2 * batch * context * shape.kv_heads * shape.head_dim * 2
    return Workload(
        decode,
        f"{shape.name} B={batch} L={context} page={page_size} width={width}",
        make,
        baselines.DECODE if width == 1 else {},
        {"page_size": page_size, "kv_bytes": kv_bytes, "batch": batch, "width": width},
    )


def _decodes(small: bool) -> Iterator[Workload]:
    if small:
        yield _decode(QWEN3_06B, 1, 128)
        yield _decode(QWEN3_06B, 16, 1024)
        yield _decode(LLAMA_8B, 4, 1000, page_size=1)
        return
    for batch, context in ((1, 128), (1, 8192), (1, 32768), (1, 131072), (16, 1024), (256, 128)):
        yield _decode(LLAMA_8B, batch, context)
    for page_size in (1, 16, 64):
        for batch, context in ((64, 4096), (256, 1024), (16, 4096)):
            yield _decode(LLAMA_8B, batch, context, page_size)
    for shape in (QWEN3_06B, QWEN3_14B, QWEN3_32B, QWEN3_30B_A3B):
        yield _decode(shape, 64, 4096)
    for width in (2, 4, 8):
        yield _decode(LLAMA_8B, 64, 4096, width=width)


def _prefill(
    shape: Shape,
    queries: list[int],
    lengths: list[int],
    *,
    page_size: int = 16,
    shuffled: bool = True,
) -> Workload:
    def make(setting: Setting) -> Arguments:
        arguments = paged(setting, shape, queries, lengths, page_size=page_size, shuffled=shuffled)
        offsets = torch.tensor([0, *queries]).cumsum(0).int().to(setting.device)
        return arguments | {"cu_seqlens_q": offsets, "max_seqlen_q": max(queries)}

    pages = "shuffled" if shuffled else "in order"
    return Workload(
        attention,
        f"{shape.name} {len(queries)} x {queries[0]} of {lengths[0]} page={page_size} {pages}",
        make,
        baselines.PREFILL if queries == lengths else {},
        {
            "page_size": page_size,
            "shuffled": shuffled,
            "queries": queries[0],
            "length": lengths[0],
            "count": len(queries),
        },
    )


def _prefills(small: bool) -> Iterator[Workload]:
    if small:
        yield _prefill(QWEN3_06B, [256] * 2, [256] * 2)
        yield _prefill(LLAMA_8B, [128], [512])
        return
    for length in (1024, 2048, 4096, 8192):
        yield _prefill(LLAMA_8B, [length] * 4, [length] * 4)
    for page_size in (1, 64):
        yield _prefill(LLAMA_8B, [8192] * 4, [8192] * 4, page_size=page_size)
    for shuffled in (True, False):
        yield _prefill(LLAMA_8B, [1024] * 4, [9216] * 4, shuffled=shuffled)
    yield _prefill(QWEN3_06B, [4096] * 4, [4096] * 4)
    yield _prefill(QWEN3_32B, [4096] * 2, [4096] * 2)
    yield _prefill(QWEN3_30B_A3B, [4096] * 2, [4096] * 2)


def _merges(small: bool) -> Iterator[Workload]:
    for tokens in (16,) if small else (64, 4096):

        def make(setting: Setting, tokens: int = tokens) -> Arguments:
            heads, dim = LLAMA_8B.q_heads, LLAMA_8B.head_dim
            lse = torch.randn(2, tokens, heads, generator=setting.generator, device=setting.device)
            return {"parts": setting.normal(2, tokens, heads, dim), "lse": lse}

        yield Workload(merge, f"2 states, {tokens} tokens, 32 heads of 128", make)


# ---- elementwise ----------------------------------------------------------------------------


def _token_counts(small: bool) -> tuple[int, ...]:
    return (16, 256) if small else (1, 64, 4096, 16384)


def _elementwise(small: bool) -> Iterator[Workload]:
    shape = QWEN3_06B if small else QWEN3_8B
    for tokens in _token_counts(small):
        tags = {"tokens": tokens}

        def norm(setting: Setting, tokens: int = tokens) -> Arguments:
            return {
                "x": setting.normal(tokens, shape.hidden),
                "weight": setting.normal(shape.hidden),
                "eps": 1e-6,
            }

        def add_norm(setting: Setting, tokens: int = tokens) -> Arguments:
            return norm(setting, tokens) | {"residual": setting.normal(tokens, shape.hidden)}

        def activation(setting: Setting, tokens: int = tokens) -> Arguments:
            return {"x": setting.normal(tokens, 2 * shape.inner)}

        def prepare(setting: Setting, tokens: int = tokens) -> Arguments:
            return _qkv(setting, shape, tokens)

        label = f"{tokens} x {shape.hidden}"
        yield Workload(rmsnorm, label, norm, baselines.NORM, tags)
        yield Workload(rmsnorm, f"{label} + residual", add_norm, baselines.ADD_NORM, tags)
        yield Workload(
            silu_and_mul, f"{tokens} x 2 x {shape.inner}", activation, baselines.ACTIVATION, tags
        )
        yield Workload(
            qkv_prepare,
            f"{shape.name} {tokens} tokens",
            prepare,
            {"eager torch": baselines.reference_of(qkv_prepare)},
            tags,
        )


def _qkv(setting: Setting, shape: Shape, tokens: int) -> Arguments:
    device = setting.device
    heads, dim = shape.q_heads + 2 * shape.kv_heads, shape.head_dim
    angles = torch.rand(8192, dim // 2, generator=setting.generator, device=device) * 6
    slots = torch.randperm(2 * tokens, generator=setting.generator, device=device)[:tokens]
    return {
        "qkv": setting.normal(tokens, heads * dim),
        "positions": torch.arange(tokens, device=device) % 8192,
        "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=1),
        "k_pool": setting.normal(2 * tokens, shape.kv_heads, dim),
        "v_pool": setting.normal(2 * tokens, shape.kv_heads, dim),
        "slot_mapping": slots,
        "num_q_heads": shape.q_heads,
        "q_weight": setting.normal(dim),
        "k_weight": setting.normal(dim),
    }


def _copies(small: bool) -> Iterator[Workload]:
    shape = QWEN3_06B if small else LLAMA_8B
    for tokens in _token_counts(small):

        def write(setting: Setting, tokens: int = tokens) -> Arguments:
            arguments = _qkv(setting, shape, tokens)
            size = (tokens, shape.kv_heads, shape.head_dim)
            kept = {name: arguments[name] for name in ("k_pool", "v_pool", "slot_mapping")}
            return {"k": setting.normal(*size), "v": setting.normal(*size)} | kept

        label = f"{shape.name} {tokens} tokens"
        yield Workload(write_kv, label, write, baselines.WRITE_KV, {"tokens": tokens})
    layers, jobs = (4, 3) if small else (32, 64)

    def pages(setting: Setting) -> Arguments:
        size = (layers, 2, 2 * jobs * 16, shape.kv_heads, shape.head_dim)
        order = torch.arange(jobs, dtype=torch.int32, device=setting.device)
        counts = torch.full_like(order, 16)
        table = torch.stack([order, order + jobs, counts], dim=1)
        return {"storage": setting.normal(*size), "jobs": table, "page_size": 16}

    yield Workload(copy_pages, f"{jobs} pages of 16, {layers} layers", pages)


# ---- sampling and products ------------------------------------------------------------------


def _samples(small: bool) -> Iterator[Workload]:
    settings: dict[str, dict[str, float]] = {
        "greedy": {"temperature": 0.0},
        "temperature": {"temperature": 0.8},
        "top-p": {"temperature": 0.8, "top_p": 0.9},
        "top-k top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    }
    rows, vocab = (4, 4096) if small else (256, 152064)
    for name, fields in settings.items():

        def make(setting: Setting, fields: dict[str, float] = fields) -> Arguments:
            device, generator = setting.device, setting.generator
            logits = torch.randn(rows, vocab, generator=generator, device=device) * 3
            return {
                "logits": logits,
                "rows": torch.arange(rows, dtype=torch.int32, device=device),
                "positions": torch.arange(rows, device=device) + 100,
                "params": make_params(rows, **fields).to(device),
            }

        yield Workload(
            sample,
            f"{rows} x {vocab} {name}",
            make,
            baselines.sampling(fields),
            {"rows": rows, "filter": name},
            num_bytes=rows * vocab * 4,
        )


def _products(small: bool) -> Iterator[Workload]:
    shape = QWEN3_06B if small else QWEN3_8B
    for tokens in (16,) if small else (16, 256, 4096):

        def product(setting: Setting, tokens: int = tokens) -> Arguments:
            scale = shape.hidden**-0.5
            return {
                "x": setting.normal(tokens, shape.hidden),
                "weight": setting.normal(2 * shape.inner, shape.hidden, scale=scale),
            }

        label = f"{tokens} x {shape.hidden} -> {2 * shape.inner}"
        yield Workload(linear, label, product, baselines.LINEAR, {"tokens": tokens})
    hidden, inner, experts, top = QWEN3_30B_A3B.hidden, QWEN3_30B_A3B.inner, EXPERTS, 8
    if small:
        hidden, inner, experts, top = 256, 128, 8, 2
    for tokens in (16,) if small else (16, 256, 4096):

        def mixture(setting: Setting, tokens: int = tokens) -> Arguments:
            scores = torch.rand(tokens, experts, generator=setting.generator, device=setting.device)
            best = scores.topk(top, dim=1)
            return {
                "x": setting.normal(tokens, hidden),
                "gate_up": setting.normal(experts, 2 * inner, hidden, scale=hidden**-0.5),
                "down": setting.normal(experts, hidden, inner, scale=inner**-0.5),
                "weights": F.normalize(best.values, p=1, dim=1),
                "ids": best.indices.int(),
            }

        yield Workload(
            moe_experts,
            f"{tokens} tokens, {top} of {experts} experts, {hidden} x {inner}",
            mixture,
            {"loop over experts": baselines.reference_of(moe_experts)},
            {"tokens": tokens},
        )
