"""A long system prompt shared by many requests, read once: the same answers, token for token."""

import json
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import pytest

from minisgl import LLM, SamplingParams
from minisgl.device.tape import by_call
from minisgl.kernels.cascade import cascade
from minisgl.layers import attention
from tests.llm.test_batch_invariant import FAMILIES
from tests.llm.test_graphs import NGRAM
from tests.world.checkpoints import TINY

SYSTEM = (
    "You are the assistant of a small inference engine. Answer in one or two short sentences, "
    "say what you know of schedulers, caches, kernels and graphs, and make nothing up. "
) * 3
QUESTIONS = [
    "What is paged attention?",
    "What does a radix cache hold?",
    "Why are decode steps captured in graphs?",
    "What is 12 + 31?",
    "Name the flag that sets the page size.",
    "What is speculative decoding?",
]


@pytest.fixture
def calls():
    """How often the op was called, and how often for how many sequences of a group."""
    counted = Counter[int]()

    @by_call
    def spy(q, kv, groups, shared, **facts):
        counted.update(count for _, count, _ in groups.tolist() if count)
        return cascade(q, kv, groups, shared, **facts)

    with patch.object(attention, "cascade", spy):
        yield counted


def _chat(**config) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=40)
    chats = [
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
        for question in QUESTIONS
    ]
    with LLM(dtype="float32", device="cpu", max_total_tokens=8192, **config) as llm:
        llm.chat(chats[:1], params, use_tqdm=False)  # fills the cache
        return [o.token_ids for o in llm.chat(chats, params, use_tqdm=False)]


def test_bundled_model_answers_alike_with_groups_and_without(calls):
    answers = _chat(cascade_min_shared_tokens=64)
    assert calls[len(QUESTIONS)] > 5  # layers and steps in which all are one group
    calls.clear()
    assert _chat(disable_cascade=True) == answers
    assert not calls


def _folder(tmp_path: Path, **fields) -> str:
    known = TINY | {"hidden_act": "silu", "rope_theta": 1e4} | fields
    (tmp_path / "config.json").write_text(json.dumps(known))
    return str(tmp_path)


def _complete(folder: str, **config) -> list[list[int]]:
    return _spared(folder, 70, **config)[0]


def _spared(folder: str, shared: int, **config) -> tuple[list[list[int]], int]:
    """The tokens of prompts with so many in common, and how many groups spared a step to read."""
    prompts = [[5 + i % 90 for i in range(shared)] + [100 + n, 3] for n in range(5)]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    settings = {"load_format": "dummy", "dtype": "float32", "device": "cpu"} | config
    with LLM(folder, max_total_tokens=1024, **settings) as llm:
        llm.generate([prompts[0]], params, use_tqdm=False)
        tokens = [o.token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
        return tokens, llm.stats().scheduler.num_spared_tokens


@pytest.mark.parametrize("drafts", [{}, NGRAM], ids=["", "drafts"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_groups_on_a_cpu(tmp_path, dtype, drafts):
    """They are planned unasked, where whole blocks of keys are shared, and replayed like others."""
    options = {"dtype": dtype} | drafts
    folder = _folder(tmp_path, **FAMILIES["qwen3"], max_position_embeddings=512)
    tokens, spared = _spared(folder, 300, **options)
    assert spared
    eager, spared = _spared(folder, 300, disable_cuda_graph=True, **options)
    assert spared
    assert eager == tokens
    assert _spared(folder, 300, disable_cascade=True, **options) == (tokens, 0)
    assert not _spared(folder, 20, **options)[1]


def test_windowed_layers_and_capped_logits(tmp_path, calls):
    """Every second layer has a window, which is read as it is without groups."""
    folder = _folder(tmp_path, **FAMILIES["gemma2"])
    answers = _complete(folder, cascade_min_shared_tokens=16)
    assert calls
    assert _complete(folder) == answers


def test_groups_are_refused_where_they_cannot_be(tmp_path):
    folder = _folder(tmp_path, architectures=["MistralForCausalLM"], sliding_window=9)
    with pytest.raises(ValueError, match=r"cascade_min_shared_tokens must be absent for .* got 16"):
        _complete(folder, cascade_min_shared_tokens=16)
    for other in ("disable_cascade", "disable_radix_cache", "batch_invariant"):
        with pytest.raises(ValueError, match=f"needs cascade groups, got {other}"):
            _complete(folder, cascade_min_shared_tokens=16, **{other: True})
    with pytest.raises(ValueError, match="cascade_min_shared_tokens must be at least 1, got 0"):
        _complete(folder, cascade_min_shared_tokens=0)
