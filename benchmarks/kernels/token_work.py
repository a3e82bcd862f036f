"""What is done to each token outside of products: norms, activations, heads, KV moves, the step."""

from collections.abc import Iterator

import torch

from benchmarks.kernels import baselines
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
from minisgl.kernels.activation import silu_and_mul
from minisgl.kernels.advance import accept_and_advance, prepare_inputs, prepare_points
from minisgl.kernels.embedding import embedding
from minisgl.kernels.kv_copy import copy_pages
from minisgl.kernels.kv_staging import gather_pages, scatter_pages
from minisgl.kernels.propose import keep_proposals, prepare_proposals
from minisgl.kernels.qkv_prepare import qkv_prepare
from minisgl.kernels.rmsnorm import rmsnorm

MAX_POSITION = 8192
# Goals read one case of few tokens and two of many; the first is a CPU's.
GOAL_CASES = ((QWEN3_06B, 16), (QWEN3_8B, 64), (QWEN3_8B, 4096), (QWEN3_8B, 16384))


def _cases(small: bool) -> Iterator[tuple[Shape, int]]:
    """Every token count at one width, and one count at every other."""
    if small:
        yield from ((QWEN3_06B, 16), (QWEN3_06B, 256))
        return
    yield from ((QWEN3_8B, tokens) for tokens in (1, 64, 4096, 16384))
    yield from ((shape, 4096) for shape in (QWEN3_06B, QWEN3_14B, QWEN3_32B, QWEN3_30B_A3B))


def rowwise(small: bool) -> Iterator[Workload]:
    for shape, tokens in _cases(small):
        tags, hidden, inner = {"tokens": tokens}, shape.hidden, shape.inner

        def norm(setting: Setting, tokens: int = tokens, hidden: int = hidden) -> Arguments:
            x, weight = setting.normal(tokens, hidden), setting.normal(hidden)
            return {"x": x, "weight": weight, "eps": 1e-6}

        def add_norm(setting: Setting, tokens: int = tokens, hidden: int = hidden) -> Arguments:
            return norm(setting, tokens, hidden) | {"residual": setting.normal(tokens, hidden)}

        def activation(setting: Setting, tokens: int = tokens, inner: int = inner) -> Arguments:
            return {"x": setting.normal(tokens, 2 * inner)}

        def embed(setting: Setting, tokens: int = tokens, hidden: int = hidden) -> Arguments:
            ids, rows = setting.integers(0, 4096, tokens), setting.normal(4096, hidden)
            return {"ids": ids, "weight": rows, "scale": 8.0}

        label = f"{tokens} x {hidden}"
        goal = () if (shape, tokens) in GOAL_CASES else None
        added, halves = f"{label} + residual", f"{tokens} x 2 x {inner}"
        for op, name, make, rivals in (
            (rmsnorm, label, norm, baselines.NORM),
            (rmsnorm, added, add_norm, baselines.ADD_NORM),
            (silu_and_mul, halves, activation, baselines.ACTIVATION),
        ):
            yield Workload(op, name, make, rivals, tags, goal_rivals=goal)
        yield Workload(embedding, label, embed, {}, tags)


def heads(small: bool) -> Iterator[Workload]:
    for shape, tokens in _cases(small):
        tags, label = {"tokens": tokens}, f"{shape.name} {tokens} tokens"

        def prepare(setting: Setting, shape: Shape = shape, tokens: int = tokens) -> Arguments:
            return _qkv(setting, shape, tokens)

        goal = () if (shape, tokens) in GOAL_CASES else None
        eager = {"eager torch": baselines.reference_of(qkv_prepare)}
        yield Workload(qkv_prepare, label, prepare, eager, tags, goal_rivals=goal)


def _qkv(setting: Setting, shape: Shape, tokens: int) -> Arguments:
    device, dim = setting.device, shape.head_dim
    angles = torch.rand(MAX_POSITION, dim // 2, generator=setting.generator, device=device) * 6
    return {
        "qkv": setting.normal(tokens, (shape.q_heads + 2 * shape.kv_heads) * dim),
        "positions": torch.arange(tokens, device=device) % MAX_POSITION,
        "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=1),
        "k_pool": setting.normal(2 * tokens, shape.kv_heads, dim),
        "v_pool": setting.normal(2 * tokens, shape.kv_heads, dim),
        "slot_mapping": setting.order(2 * tokens)[:tokens],
        "num_q_heads": shape.q_heads,
        "q_weight": setting.normal(dim),
        "k_weight": setting.normal(dim),
    }


def pages(small: bool) -> Iterator[Workload]:
    """Pages of 16 tokens in all layers: copy jobs, and the way to and from pinned host memory."""
    shape = QWEN3_06B if small else LLAMA_8B
    layers, size = (4, 16) if small else (32, 16)
    for jobs in (3,) if small else (1, 64):

        def copy(setting: Setting, jobs: int = jobs) -> Arguments:
            order = setting.order(2 * jobs).int()
            counts = torch.full_like(order[:jobs], size - 1)
            table = torch.stack([order[:jobs], order[jobs:], counts], dim=1)
            storage = setting.normal(layers, 2, 2 * jobs * size, shape.kv_heads, shape.head_dim)
            return {"storage": storage, "jobs": table, "page_size": size}

        label = f"{jobs} pages of {size}, {layers} layers"
        yield Workload(copy_pages, label, copy, baselines.COPY_PAGES, {"jobs": jobs})
    count = 3 if small else 32

    def stage(setting: Setting) -> Arguments:
        storage = setting.normal(layers, 2, 2 * count * size, shape.kv_heads, shape.head_dim)
        staging = torch.zeros(count, layers, 2, size, *storage.shape[3:], dtype=setting.dtype)
        on_gpu = setting.device.type == "cuda"
        return {
            "storage": storage,
            "pages": setting.order(2 * count)[:count].int(),
            "staging": staging.pin_memory() if on_gpu else staging,
        }

    label = f"{count} pages of {size}, {layers} layers, pinned"
    yield Workload(gather_pages, label, stage, baselines.GATHER_PAGES, {"pages": count})
    yield Workload(scatter_pages, label, stage, baselines.SCATTER_PAGES, {"pages": count})


def proposals(small: bool) -> Iterator[Workload]:
    """Around a later pass of a draft model, of three."""
    count, vocab = (8, 4096) if small else (256, QWEN3_8B.vocab)

    def nth(setting: Setting) -> Arguments:
        place = torch.ones(1, dtype=torch.int64, device=setting.device)
        return {"drafted": setting.integers(0, vocab, count, 3), "nth": place}

    def prepare(setting: Setting) -> Arguments:
        asked = setting.integers(0, 2, 4, count)
        asked[0] = setting.order(count)
        state = {name: setting.integers(0, 4000, count) for name in ("last", "previous", "lengths")}
        return {"asked": asked, "width": 1} | nth(setting) | state

    def keep(setting: Setting) -> Arguments:
        return {"tokens": setting.integers(0, vocab, count)} | nth(setting)

    yield Workload(prepare_proposals, f"{count} rows", prepare, {}, {})
    yield Workload(keep_proposals, f"{count} rows", keep, {}, {})


def steps(small: bool) -> Iterator[Workload]:
    """A decode step before and after the model, without drafts and with three."""
    count, vocab = (8, 4096) if small else (256, QWEN3_8B.vocab)
    for width in (1, 4):
        tokens, tags = count * width, {"sequences": count, "width": width}

        def prepare(setting: Setting, width: int = width, tokens: int = tokens) -> Arguments:
            device, places = setting.device, torch.arange(tokens, device=setting.device)
            ids = setting.integers(0, vocab, tokens)
            ids[::width] = -1
            rows = setting.order(count).int()
            return {
                "input_ids": torch.zeros_like(ids),
                "positions": torch.zeros_like(places),
                "slot_mapping": torch.zeros_like(places),
                "seq_lens": torch.zeros_like(rows),
                "token_ids": ids,
                "sequences": (places // width).int(),
                "offsets": torch.arange(count + 1, dtype=torch.int32, device=device) * width,
                "rows": rows,
                "starts": torch.full_like(rows, -1),
                "num_tokens": torch.full_like(rows, width),
                "last": setting.integers(0, vocab, count),
                "lengths": setting.integers(0, 4000, count),
                "page_table": setting.order(count * 256).int().view(count, 256),
                "page_size": 16,
            }

        def points(setting: Setting, width: int = width, tokens: int = tokens) -> Arguments:
            rows = setting.order(count).int()
            return {
                "ids": setting.integers(0, vocab, tokens),
                "positions": setting.order(tokens),
                "rows": rows,
                "num_tokens": torch.full_like(rows, width),
            }

        def advance(setting: Setting, width: int = width, tokens: int = tokens) -> Arguments:
            sampled = setting.integers(0, vocab, tokens)
            first = torch.arange(count, dtype=torch.int32, device=setting.device) * width
            return {
                "tokens": sampled,
                "first": first,
                "rows": setting.order(count).int(),
                "drafts": sampled.view(count, width)[:, : width - 1].contiguous(),
                "positions": torch.arange(tokens, device=setting.device),
                "last": torch.zeros_like(first),
                "lengths": torch.zeros_like(first),
                "counts": setting.integers(0, 2, count, vocab),
                "counted": torch.arange(count, dtype=torch.int32, device=setting.device) % 2,
            }

        label = f"{count} sequences, {width} tokens each"
        yield Workload(prepare_inputs, label, prepare, {}, tags)
        yield Workload(prepare_points, label, points, {}, tags)
        yield Workload(accept_and_advance, label, advance, {}, tags)
