"""The compile gate: every kernel the engine launches, compiled for each GPU with no GPU at hand.

    python -m tools.compile_gate [--arch 90] [--kernel decode] [--baseline FILE] [--write FILE]

What serving these models launches is recorded (`launches`), and what cards name beside it as their
`variants`. So every value of an option (head size 64, 80, 96, 128, 256; pages of 1, 16, 32, 64; 1,
2, 4, 5, 8 query heads per key head; bf16, fp16, fp32; a window, a soft cap, normed heads, drafts,
groups, a fixed order, log-sum-exp) is compiled for every architecture at least once, but not every
combination of values. The cubins are read: registers, local memory, shared memory, and the
instructions that matter for speed.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minisgl.config import EngineConfig
from minisgl.core.executor import Limits
from minisgl.kernels.config import ARCHITECTURES
from minisgl.kernels.grouped_linear.blocks import Form
from minisgl.kernels.offline import Variant, recorded
from minisgl.kernels.op import all_ops
from minisgl.layers.embedding import VocabTable
from minisgl.layers.weights import Forms, Placement
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.models.presets import PRESETS, decoder
from minisgl.start.facts import Facts, uses_cascade
from minisgl.start.launches import serve
from minisgl.step.sizes import GraphSizes
from tools.machine_code import INTERPRETED, TRITON, expected, problems, read, regressions

# Two layers launch what many do. Of a vocabulary and a context only what divides them matters.
SMALL = {"num_hidden_layers": 2, "max_position_embeddings": 7936, "vocab_size": 128256}


def _preset(name: str, **facts: Any) -> ModelConfig:
    """A published model, but small in what no kernel depends on, and with other `facts`."""
    return ModelConfig.from_dict(PRESETS[name] | SMALL | facts)


def _model(
    family: str, hidden: int, inner: int, heads: int, kv_heads: int, head_dim: int, **facts: Any
) -> ModelConfig:
    config = decoder(family, 2, hidden, heads, kv_heads, head_dim, inner, 128256)
    return ModelConfig.from_dict(config | SMALL | facts)


DRAFTS = {"speculative_algorithm": "ngram", "speculative_num_draft_tokens": 3}
ALONE = {"disable_cascade": True}  # groups of one model will do
MODELS: Mapping[str, tuple[ModelConfig, Mapping[str, Any]]] = {
    "llama-8b": (_preset("llama-3.1-8b"), DRAFTS | {"max_running_requests": 512}),
    "llama-8b fixed order": (
        _preset("llama-3.1-8b", attention_bias=True),
        {"batch_invariant": True},
    ),
    "llama-8b fp16": (_preset("llama-3.1-8b", dtype="float16"), ALONE),
    "qwen3-14b": (_preset("qwen3-14b"), ALONE | {"page_size": 64}),
    "qwen3-30b-a3b": (_preset("qwen3-30b-a3b"), ALONE | {"page_size": 1}),
    "gemma": (_model("Gemma2", 2304, 9216, 8, 4, 256, sliding_window=1024), ALONE),
    "mha-d64": (
        _model("Llama", 768, 3072, 12, 12, 64, dtype="float16"),
        ALONE | {"page_size": 32},
    ),
    "mha-d80": (_model("Llama", 2560, 10240, 32, 32, 80), ALONE),
    "mha-d96": (
        _model("Mistral", 3072, 8192, 32, 32, 96, sliding_window=2047),
        {"page_size": 64},
    ),
    "llama-8b int4": (_preset("llama-3.1-8b"), ALONE | {"quantization": "int4"}),
    "llama-8b int8": (_preset("llama-3.1-8b"), ALONE | {"quantization": "int8"}),
    "qwen3-30b-a3b int4": (
        _preset("qwen3-30b-a3b"),
        ALONE | {"page_size": 1, "quantization": "int4"},
    ),
    "qwen3-30b-a3b int8": (
        _preset("qwen3-30b-a3b"),
        ALONE | {"page_size": 1, "quantization": "int8"},
    ),
    "tiny-fp32": (_model("Qwen3", 256, 512, 4, 2, 64, dtype="float32"), ALONE),
}

# Of kernels that treat rows one by one, these models' sizes are compiled for sm_90 alone.
ROWWISE = ("rmsnorm_kernel", "gated_kernel", "copy_pages_kernel")
FURTHER = ("llama-8b fp16", "qwen3-14b", "qwen3-30b-a3b", "mha-d80", "mha-d96")


def variants(arch: int) -> dict[str, Variant]:
    """Everything that is compiled for sm_`arch`, by what the baseline calls it."""
    found: dict[str, Variant] = {}
    known: set[str] = set()
    with recorded(arch) as launched:
        for name, launch in (*_served(), *_unserved()):
            launch()
            new = [launched[key] for key in launched if key not in known]
            if arch != 90 and name in FURTHER:
                new = [variant for variant in new if variant.name not in ROWWISE]
            found |= _labelled(name, new)
            known = set(launched)
    return found


def _served() -> Iterator[tuple[str, Callable[[], object]]]:
    """The models, and what serves each."""
    for name, (model, options) in MODELS.items():
        config = EngineConfig(**{"max_running_requests": 1, **options})
        cascade = uses_cascade(config, model)
        facts = Facts(
            config, Path(), model, model.dtype, model.max_context, cascade, GraphSizes({})
        )
        rows, page = config.max_running_requests, config.page_size
        limits = Limits(65536 // page, page, rows, model.max_context, model.vocab_size)
        # Widths between are like the longest; of numbers of sequences, one is many runs or one run.
        widths = sorted({1, 1 + config.num_draft_tokens})
        counts, forms = sorted({1, rows}), (_forms(model, config.quantization), ())
        yield name, partial(serve, facts, limits, counts=counts, widths=widths, forms=forms)


def _forms(model: ModelConfig, quantization: str) -> list[Forms]:
    """Of the blocks of a model that is rounded so: in groups of 32, the head in 8 bits."""
    blocks = Decoder(model, Placement(model.dtype, torch.device("meta"))).blocks()
    rounded: dict[str, Form] = {"int4": (4, 32, True, True), "int8": (8, 32, True, False)}
    if quantization not in rounded:
        return []
    kinds = ("int8" if isinstance(block, VocabTable) else quantization for block in blocks)
    return [(rounded[kind],) * len(b.forms()) for b, kind in zip(blocks, kinds, strict=True)]


def _unserved() -> Iterator[tuple[str, Callable[[], object]]]:
    """The calls that cards name as variants."""
    meta, generator = torch.device("meta"), torch.Generator().manual_seed(0)
    for card in all_ops():
        for implementation in card.implementations:
            if implementation.supports(meta):
                for case in card.variants.get(implementation.name, ()):
                    function = card.implementation(implementation.name)
                    arguments = case.make(meta, torch.bfloat16, generator)
                    yield f"{card.name} {case.label}", partial(function, **arguments)


def _labelled(name: str, found: Sequence[Variant]) -> dict[str, Variant]:
    """By the kernel, `name` and the constants that tell it from the kernel's other variants; where
    these do not, by types, too."""
    labels: dict[str, Variant] = {}
    for variant in found:
        alike = [other.facts for other in found if other.kernel is variant.kernel]
        own = variant.facts
        differing = [key for key in own if any(facts[key] != own[key] for facts in alike)]
        constants = [key for key in differing if not isinstance(own[key], str)]
        told = sum(all(facts[key] == own[key] for key in constants) for facts in alike) == 1
        telling = [f"{key}={own[key]}" for key in (constants if told else differing)]
        labels[" ".join([variant.name, name, *telling])] = variant
    if len(labels) < len(found):
        raise RuntimeError(f"{name}: constants and types do not tell its variants apart")
    return labels


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.compile_gate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, action="append", choices=list(ARCHITECTURES))
    parser.add_argument("--kernel", action="append", help="only kernels whose name begins so")
    parser.add_argument("--baseline", type=Path, help="fail on figures worse than this file's")
    parser.add_argument("--write", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET=1 is set: kernels are interpreted, nothing is compiled")
    baseline = json.loads(options.baseline.read_text()) if options.baseline else None
    table, failures = {}, 0
    for arch in options.arch or ARCHITECTURES:
        for label, variant in variants(arch).items():
            if options.kernel and not label.startswith(tuple(options.kernel)):
                continue
            report = read(label, variant)
            found = problems(report, expected(variant))
            found += regressions(report, baseline) if baseline is not None else []
            failures += bool(found)
            table[report.key] = report.figures()
            print(report.row(), *(f"\n    ! {text}" for text in found), flush=True)
    print(f"{len(table)} kernels compiled by triton {TRITON}, {failures} with problems")
    if options.write:
        lines = (f" {json.dumps(k)}: {json.dumps(table[k], sort_keys=True)}" for k in sorted(table))
        options.write.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
