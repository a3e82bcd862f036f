"""What the compile gate covers: the launches of serving, and those behind an option.

For every architecture it has `LLAMA` as an engine with drafts and cascade serves it, the
fixed-order mode, a mixture of experts, and of `OTHERS` what depends on a head's shape. So every
value of an option (head size 64, 80, 96, 128, 256; pages of 1, 16, 32, 64; 1, 2, 4, 5, 8 query
heads per key head; bf16, fp16, fp32; a window, a soft cap, normed heads, log-sum-exp) is compiled
for every architecture at least once, but not every combination of values. Norms and activations at
further widths are compiled for sm_90 alone.
"""

from collections.abc import Iterator
from dataclasses import replace

from minisgl.kernels.attention.hopper import attention_hopper
from minisgl.kernels.attention.portable import attention_portable
from minisgl.kernels.config import table_for
from minisgl.kernels.decode.portable import decode_portable
from minisgl.kernels.kv_copy.portable import copy_pages_portable
from minisgl.kernels.kv_staging.portable import gather_pages_portable, scatter_pages_portable
from minisgl.kernels.launches import (
    TOKENS,
    WIDE,
    Launch,
    cascades,
    chunks,
    decodes,
    empty,
    experts,
    floats,
    heads,
    ints,
    paged,
    pools,
    products,
    rows,
    rowwise,
    sampling,
)
from minisgl.kernels.merge.portable import merge_portable
from minisgl.kernels.shapes import EngineShapes, ModelShapes

LLAMA = ModelShapes(
    "llama-8b", 32, 8, 128, 4096, 128256, 32, inner=14336,
    products=((6144, 4096, True, False), (4096, 14336, False, False), (128256, 4096, False, True)),
)  # fmt: skip
QWEN_MOE = ModelShapes(
    "qwen3-30b-a3b", 32, 4, 128, 2048, 151936, 48, qk_norm=True,
    experts=128, top_k=8, expert_inner=768,
)  # fmt: skip
OTHERS = (  # with the page size they are compiled for
    (ModelShapes("qwen3-14b", 40, 8, 128, 5120, 151936, 40, inner=17408, qk_norm=True), 64),
    (QWEN_MOE, 1),
    (
        ModelShapes(
            "gemma", 8, 4, 256, 2304, 256000, 26, inner=9216, windows=(None, 1024), softcap=True,
            unit_offset=True, activation="gelu_tanh",
        ),
        16,
    ),
    (ModelShapes("mha-d64", 12, 12, 64, 768, 50304, 12, "float16", inner=3072), 32),
    (ModelShapes("mha-d80", 32, 32, 80, 2560, 51200, 32, inner=10240, rotary_dims=(32,)), 16),
    (ModelShapes("mha-d96", 32, 32, 96, 3072, 32064, 32, inner=8192, windows=(2047,)), 64),
    (ModelShapes("tiny-fp32", 4, 2, 64, 256, 2048, 5, "float32", inner=512, qk_norm=True), 16),
)  # fmt: skip
COUNTS = (1, 512)  # of sequences in a decode step: many runs each, and one


def _engine(page_size: int) -> EngineShapes:
    return EngineShapes(page_size, 65536 // page_size, 8192 // page_size, 512)


def launches(arch: int) -> Iterator[Launch]:
    """Everything that is compiled for sm_`arch`, labels unique."""
    table, engine = table_for(arch), replace(_engine(16), widths=(1, 4), max_drafts=2)
    yield from rowwise(LLAMA)
    yield from heads(LLAMA, engine)
    yield chunks(LLAMA, engine, None)
    yield from decodes(LLAMA, engine, table, None, COUNTS)
    yield from cascades(LLAMA, engine, table, COUNTS[:1])
    yield from sampling(LLAMA, engine)
    yield from rows(LLAMA, engine)
    yield from experts(QWEN_MOE, engine)
    for model, page_size in OTHERS:
        engine = _engine(page_size)
        if arch == 90 or model.unit_offset or model.dtype != "bfloat16":
            yield from rowwise(model)
        # Copying pages sees no more of a head than how many words a token has.
        yield from (x for x in heads(model, engine) if x.call is not copy_pages_portable)
        for window in model.windows:
            yield chunks(model, engine, window)
            yield from decodes(model, engine, table, window, COUNTS[:1])
    yield from _options(arch)
    yield from _pieces()


def _options(arch: int) -> Iterator[Launch]:
    """The fixed-order mode, log-sum-exp as a result, and attention in Gluon."""
    table, engine = table_for(arch), _engine(16)
    fixed = replace(engine, batch_invariant=True)
    yield from decodes(LLAMA, fixed, table, None, COUNTS)
    yield from products(LLAMA)
    half = replace(LLAMA, name="llama-8b-fp16", dtype="float16")
    yield chunks(half, engine, None)
    yield from decodes(half, engine, table, None, COUNTS[:1])
    several = {"cu_seqlens_q": ints(5), "max_seqlen_q": 512}
    call = paged(LLAMA, engine, 4, 512, return_lse=True) | several
    yield Launch("attention lse", attention_portable, call, ("load128",))
    call = paged(LLAMA, engine, COUNTS[1], COUNTS[1], return_lse=True)
    yield Launch("decode lse", decode_portable, call, ("load128",))
    if arch != 90:
        return
    for page_size in (16, 64):
        call = paged(LLAMA, _engine(page_size), 4, 512) | several
        alone = {"attention_hopper_kernel": ("wgmma", "tma", "set_registers")}
        label = f"attention-hopper page{page_size}"
        yield Launch(label, attention_hopper, call, on_hopper=alone)
    call = paged(half, engine, 4, 512, return_lse=True) | several
    yield Launch("attention-hopper fp16 lse", attention_hopper, call, on_hopper=alone)


def _pieces() -> Iterator[Launch]:
    """The merge on its own, and the ops of a second cache tier."""
    model, engine = LLAMA, _engine(16)
    dtype, sizes = model.torch_dtype, (model.kv_heads, model.head_dim)
    storage = pools(model, engine)
    q = empty(TOKENS, model.q_heads, model.head_dim, dtype=dtype)
    staging = empty(8, model.num_layers, 2, 16, *sizes, dtype=dtype)
    staged = {"storage": storage, "pages": ints(8), "staging": staging}
    yield Launch("gather_pages", gather_pages_portable, staged, WIDE)
    yield Launch("scatter_pages", scatter_pages_portable, staged, WIDE)
    for states in (2, 8):
        parts = floats(states, TOKENS, model.q_heads, model.head_dim)
        merged = {"parts": parts, "lse": floats(states, TOKENS, model.q_heads), "out": q}
        yield Launch(f"merge {states} states", merge_portable, merged, WIDE)
