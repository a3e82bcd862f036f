"""Attention over paged KV: decode, chunks, shared prefixes, and the merge of their states.

KV of one workload stays below 9 GB, so that it and a dense copy for the baselines fit a GPU.
"""

from collections.abc import Iterator

import torch

from benchmarks.kernels import attention_baselines, baselines
from benchmarks.kernels.workload import (
    LLAMA_8B,
    QWEN3_06B,
    QWEN3_8B,
    QWEN3_14B,
    QWEN3_30B_A3B,
    QWEN3_32B,
    Arguments,
    Setting,
    Shape,
    Workload,
)
from minisgl.kernels.attention import attention
from minisgl.kernels.attention.paged import PagedKV
from minisgl.kernels.cascade import cascade
from minisgl.kernels.decode import decode
from minisgl.kernels.merge import merge

MAX_GROUPS = 16  # a step's launches cover so many
RAGGED = 102_400  # tokens of the one long sequence among short ones


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
    device = setting.device
    counts = [-(-length // page_size) for length in lengths]
    total = sum(counts)
    pages = setting.order(total) if shuffled else torch.arange(total, device=device)
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32, device=device)
    for row, own in enumerate(pages.split(counts)):
        table[row, : len(own)] = own
    slots = total * page_size
    q = setting.normal(sum(queries), shape.q_heads, shape.head_dim)
    kv = PagedKV(
        k_pool=setting.normal(slots, shape.kv_heads, shape.head_dim),
        v_pool=setting.normal(slots, shape.kv_heads, shape.head_dim),
        page_table=table,
        rows=torch.arange(len(lengths), dtype=torch.int32, device=device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        page_size=page_size,
        scale=shape.head_dim**-0.5,
    )
    return {"q": q, "kv": kv}


def _decode(
    shape: Shape,
    batch: int,
    context: int,
    page_size: int = 16,
    width: int = 1,
    *,
    goal: bool = False,
) -> Workload:
    def make(setting: Setting) -> Arguments:
        queries, lengths = [width] * batch, [context] * batch
        return paged(setting, shape, queries, lengths, page_size=page_size) | {"width": width}

    return Workload(
        decode,
        f"{shape.name} B={batch} L={context} page={page_size} width={width}",
        make,
        attention_baselines.DECODE if width == 1 else {},
        {
            "model": shape.name,
            "page_size": page_size,
            "kv_bytes": batch * context * shape.kv_bytes,
            "batch": batch,
            "context": context,
            "width": width,
        },
        goal_rivals=() if goal else None,
    )


def _ragged(shape: Shape, batch: int, short: int) -> Workload:
    """One long sequence among many short ones. No rival that reads a dense copy can do it."""
    lengths = [short] * (batch - 1) + [RAGGED]

    def make(setting: Setting) -> Arguments:
        return paged(setting, shape, [1] * batch, lengths, page_size=16) | {"width": 1}

    tags = {
        "model": shape.name,
        "page_size": 16,
        "kv_bytes": sum(lengths) * shape.kv_bytes,
        "batch": batch,
        "context": RAGGED,
        "width": 1,
    }
    label = f"{shape.name} B={batch} L={short}, one {RAGGED} page=16 width=1"
    return Workload(decode, label, make, {}, tags, goal_rivals=())


def decodes(small: bool) -> Iterator[Workload]:
    if small:
        yield _decode(QWEN3_06B, 1, 128, goal=True)
        yield _decode(QWEN3_06B, 16, 1024)
        yield _decode(LLAMA_8B, 4, 1000, page_size=1)
        return
    for batch, context in ((64, 4096), (256, 1024)):
        for page_size in (16, 1, 64):
            yield _decode(LLAMA_8B, batch, context, page_size, goal=batch == 64)
    yield _ragged(LLAMA_8B, 64, 1024)
    for batch, context in ((1, 8192), (1, 128), (1, 32768), (1, 131072), (16, 1024)):
        yield _decode(LLAMA_8B, batch, context, goal=context == 8192)
    for batch, context in ((256, 128), (16, 131072), (64, 32768), (256, 8192)):
        yield _decode(LLAMA_8B, batch, context)
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
    goal_rivals: tuple[str, ...] | None = None,
) -> Workload:
    def make(setting: Setting) -> Arguments:
        arguments = paged(setting, shape, queries, lengths, page_size=page_size, shuffled=shuffled)
        offsets = torch.tensor([0, *queries]).cumsum(0).int().to(setting.device)
        return arguments | {"cu_seqlens_q": offsets, "max_seqlen_q": max(queries)}

    rivals = attention_baselines.PREFILL if queries == lengths else attention_baselines.EXTEND
    pages = "shuffled" if shuffled else "in order"
    return Workload(
        attention,
        f"{shape.name} {len(queries)} x {queries[0]} of {lengths[0]} page={page_size} {pages}",
        make,
        rivals,
        {
            "page_size": page_size,
            "shuffled": shuffled,
            "queries": queries[0],
            "length": lengths[0],
            "count": len(queries),
        },
        goal_rivals=goal_rivals,
    )


def prefills(small: bool) -> Iterator[Workload]:
    if small:
        yield _prefill(QWEN3_06B, [256] * 2, [256] * 2, goal_rivals=("SDPA",))
        yield _prefill(LLAMA_8B, [128], [512])
        return
    yield _prefill(LLAMA_8B, [8192] * 4, [8192] * 4, goal_rivals=("SDPA cuDNN",))
    for shuffled in (True, False):
        yield _prefill(LLAMA_8B, [1024] * 4, [9216] * 4, shuffled=shuffled, goal_rivals=())
    for page_size in (1, 64):
        yield _prefill(LLAMA_8B, [8192] * 4, [8192] * 4, page_size=page_size)
    for length in (512, 1024, 2048, 4096):
        yield _prefill(LLAMA_8B, [length] * 4, [length] * 4)
    yield _prefill(LLAMA_8B, [2048], [131072])
    for shape in (QWEN3_06B, QWEN3_14B, QWEN3_32B, QWEN3_30B_A3B):
        yield _prefill(shape, [4096] * 2, [4096] * 2)


def _cascade(
    shape: Shape, groups: int, batch: int, shared: int, own: int, *, goal: bool = False
) -> Workload:
    """`batch` sequences in equal groups; each group has its own prefix of `shared` tokens."""
    page_size, members = 16, batch // groups

    def make(setting: Setting) -> Arguments:
        heads, tails = shared // page_size, -(-own // page_size)
        made = paged(
            setting,
            shape,
            [1] * batch,
            [heads * page_size] * groups + [tails * page_size] * batch,
            page_size=page_size,
        )
        kv: PagedKV = made["kv"]
        pages, rows = kv.page_table, kv.rows[:batch]
        prefixes = pages[:groups, :heads].repeat_interleave(members, dim=0)
        plan = torch.zeros(MAX_GROUPS, 3, dtype=torch.int32)
        for g in range(groups):
            plan[g] = torch.tensor([g * members, members, heads])
        kv = kv._replace(
            page_table=torch.cat([prefixes, pages[groups:, :tails]], dim=1),
            rows=rows,
            seq_lens=torch.full_like(rows, heads * page_size + own),
        )
        return {
            "q": made["q"],
            "kv": kv,
            "groups": plan.to(setting.device),
            "shared": torch.full_like(rows, heads * page_size),
        }

    return Workload(
        cascade,
        f"{shape.name} {groups} x {members} L={shared} shared + {own}",
        make,
        {"plain decode": attention_baselines.plain_decode},
        {"batch": batch, "shared": shared, "groups": groups},
        goal_rivals=("plain decode",) if goal else None,
    )


def cascades(small: bool) -> Iterator[Workload]:
    if small:
        yield _cascade(QWEN3_06B, 2, 6, 128, 40, goal=True)
        return
    yield _cascade(LLAMA_8B, 1, 64, 4096, 256, goal=True)
    yield _cascade(LLAMA_8B, 4, 64, 4096, 256)
    yield _cascade(LLAMA_8B, 1, 16, 4096, 256)
    yield _cascade(LLAMA_8B, 1, 4, 4096, 256)
    yield _cascade(LLAMA_8B, 1, 256, 2048, 128)
    yield _cascade(QWEN3_30B_A3B, 1, 64, 4096, 256)


def merges(small: bool) -> Iterator[Workload]:
    shape = QWEN3_06B if small else QWEN3_8B
    sizes = ((2, 16),) if small else ((16, 1), (32, 4), (2, 64), (8, 64), (2, 4096))
    for states, tokens in sizes:

        def make(setting: Setting, states: int = states, tokens: int = tokens) -> Arguments:
            size = (states, tokens, shape.q_heads)
            return {
                "parts": setting.normal(*size, shape.head_dim, dtype=torch.float32),
                "lse": setting.normal(*size, dtype=torch.float32),
            }

        yield Workload(
            merge,
            f"{states} states, {tokens} tokens, {shape.q_heads} heads of {shape.head_dim}",
            make,
            {"eager torch": baselines.reference_of(merge)},
            {"tokens": tokens, "states": states},
            goal_rivals=() if states >= 16 else None,
        )
