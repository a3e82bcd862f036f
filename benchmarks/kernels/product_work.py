"""Matrix products: linear layers, with weights in floats and in codes, and mixtures of experts."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
import torch.nn.functional as F

from benchmarks.kernels import baselines
from benchmarks.kernels.workload import (
    QWEN3_06B,
    QWEN3_8B,
    QWEN3_30B_A3B,
    Arguments,
    Setting,
    Workload,
)
from minisgl.kernels.grouped_linear import grouped_linear
from minisgl.kernels.grouped_linear.weights import quantized
from minisgl.kernels.linear import linear
from minisgl.kernels.matrix import packed
from minisgl.kernels.moe import moe_experts, moe_route


def products(small: bool) -> Iterator[Workload]:
    """The feed-forward layer's two products. The op's own "cublas" is what a user would call."""
    shape = QWEN3_06B if small else QWEN3_8B
    for tokens in (16,) if small else (1, 16, 256, 4096):
        for inputs, outputs in ((shape.hidden, 2 * shape.inner), (shape.inner, shape.hidden)):

            def make(
                setting: Setting, tokens: int = tokens, inputs: int = inputs, outputs: int = outputs
            ) -> Arguments:
                weight = setting.normal(outputs, inputs, scale=inputs**-0.5)
                return {"x": setting.normal(tokens, inputs), "weight": weight}

            label = f"{tokens} x {inputs} -> {outputs}"
            yield Workload(linear, label, make, baselines.LINEAR, {"tokens": tokens})


def products_in_codes(small: bool) -> Iterator[Workload]:
    """The same with weights of 4 and 8 bits, in groups of 32; goals read the larger of the two."""
    shape = QWEN3_06B if small else QWEN3_8B
    for tokens, bits in product((16,) if small else (1, 4, 16, 64, 4096), (4, 8)):
        for inputs, outputs in ((shape.hidden, 2 * shape.inner), (shape.inner, shape.hidden)):

            def make(
                setting: Setting,
                tokens: int = tokens,
                bits: int = bits,
                inputs: int = inputs,
                outputs: int = outputs,
            ) -> Arguments:
                floats = setting.normal(outputs, inputs, scale=inputs**-0.5)
                weight = replace(quantized(floats, bits, 32), dtype=setting.dtype)
                return {"x": setting.normal(tokens, inputs), "weight": packed(weight)}

            yield Workload(
                grouped_linear,
                f"{tokens} x {inputs} -> {outputs}, {bits} bits",
                make,
                baselines.GROUPED_LINEAR,
                {"tokens": tokens, "bits": bits},
                goal_rivals=() if inputs < outputs and tokens in (1, 16, 4096) else None,
            )


def mixtures(small: bool) -> Iterator[Workload]:
    shape = QWEN3_30B_A3B
    assert shape.moe is not None
    whole = (shape.hidden, shape.inner, shape.moe.num_experts, shape.moe.top_k)
    hidden, inner, experts, top = (256, 128, 8, 2) if small else whole
    for tokens in (16,) if small else (1, 16, 256, 4096):
        tags = {"tokens": tokens}

        def route(setting: Setting, tokens: int = tokens) -> Arguments:
            scores = setting.normal(tokens, experts)
            return {"logits": scores, "top_k": top, "renormalize": True}

        def mixture(setting: Setting, tokens: int = tokens) -> Arguments:
            best = setting.normal(tokens, experts, dtype=torch.float32).exp().topk(top, dim=1)
            return {
                "x": setting.normal(tokens, hidden),
                "gate_up": setting.normal(experts, 2 * inner, hidden, scale=hidden**-0.5),
                "down": setting.normal(experts, hidden, inner, scale=inner**-0.5),
                "weights": F.normalize(best.values, p=1, dim=1),
                "ids": best.indices.int(),
            }

        label = f"{tokens} tokens, {top} of {experts} experts"
        yield Workload(moe_route, label, route, baselines.ROUTE, tags)
        yield Workload(
            moe_experts,
            f"{label}, {hidden} x {inner}",
            mixture,
            {"loop over experts": baselines.reference_of(moe_experts)},
            tags,
            goal_rivals=() if tokens in (16, 4096) else None,
        )
