"""In the batch-invariant mode a request's tokens and log-probabilities do not depend, bit for bit,
on its batch, the chunking, the cache, preemption, overlap or graphs."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from minisgl import LLM, SamplingParams
from minisgl.core.request import TokenLogprobs
from tests.world.checkpoints import TINY

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16, "rms_norm_eps": 1e-6},
    "qwen3-moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "head_dim": 16,
        "rms_norm_eps": 1e-6,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "norm_topk_prob": True,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "sliding_window": 9,
        "query_pre_attn_scalar": 30,
        "attn_logit_softcapping": 5.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
}
# Many rows go through another product on CPU, and chunks through another attention.
ROOMY: dict[str, Any] = {"chunked_prefill_size": 512, "max_total_tokens": 4096}
TIGHT: dict[str, Any] = {
    "chunked_prefill_size": 23,
    "max_total_tokens": 480,
    "max_running_requests": 5,
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
}


def folder_of(tmp_path: Path, family: str) -> Path:
    fields = TINY | {"hidden_act": "silu", "rope_theta": 1e4} | FAMILIES[family]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    return tmp_path


def some_prompts() -> list[list[int]]:
    """The last two share 50 tokens with the one before them."""
    generator = random.Random(0)
    lengths = (1, 16, 200, 97, 40, 90, 60)
    given = [[generator.randrange(3, TINY["vocab_size"]) for _ in range(n)] for n in lengths]
    given[-1][:50] = given[-2][:50]
    return given


def _run(folder: Path, together: bool, **options: Any) -> list[list[TokenLogprobs]]:
    """Per prompt its tokens and their log-probabilities; one after another, or in one batch."""
    params = [
        SamplingParams(temperature=1.0, seed=i, max_tokens=30, logprobs=2, ignore_eos=True)
        for i, _ in enumerate(some_prompts())
    ]
    options = {"device": "cpu", "load_format": "dummy", "log_level": "warning"} | options
    with LLM(folder, **options) as llm:
        if together:
            outputs = llm.generate(some_prompts(), params, use_tqdm=False)
            assert bool(llm.stats().scheduler.num_preemptions) == (options.items() >= TIGHT.items())
        else:
            pairs = zip(some_prompts(), params, strict=True)
            outputs = [llm.generate(*pair, use_tqdm=False) for pair in pairs]
    return [o.outputs[0].logprobs for o in outputs]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("qwen3", "bfloat16"),
        ("qwen3", "float32"),
        ("qwen3-moe", "bfloat16"),
        ("gemma2", "bfloat16"),
    ],
)
def test_nothing_beside_a_request_changes_a_bit_of_it(family: str, dtype: str, tmp_path: Path):
    folder = folder_of(tmp_path, family)
    facts = {"dtype": dtype, "batch_invariant": True}
    alone = _run(folder, False, disable_radix_cache=True, **ROOMY, **facts)
    assert _run(folder, True, **ROOMY, **facts) == alone
    assert _run(folder, True, **TIGHT, **facts) == alone
    assert _run(folder, True, piecewise_cuda_graph_max_tokens=200, **ROOMY, **facts) == alone
    assert _run(folder, False, page_size=1, **TIGHT, **facts) == alone


def test_without_the_mode_bits_do_differ(tmp_path: Path):
    """In fp32: in bf16 the CPU's products add in a fixed order anyway."""
    folder = folder_of(tmp_path, "qwen3")
    alone = _run(folder, False, dtype="float32", **ROOMY)
    assert _run(folder, True, dtype="float32", **TIGHT) != alone


def test_what_the_mode_cannot_serve_is_refused(tmp_path: Path):
    folder = folder_of(tmp_path, "qwen3")
    options = {"device": "cpu", "load_format": "dummy", "batch_invariant": True}
    with pytest.raises(ValueError, match=r"batch_invariant on CPU needs dtype .*float16"):
        LLM(folder, dtype="float16", **options)
    fields = json.loads((folder / "config.json").read_text()) | {"head_dim": 20}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"needs a head_dim among .* got 20"):
        LLM(folder, dtype="bfloat16", **options)
