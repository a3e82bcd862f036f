"""Speculation with the bundled pair: the same tokens with and without, whatever else is asked."""

import json
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks.speculative import BUNDLED, SIDES, questions
from minisgl import LLM, SamplingParams
from minisgl.build import build_engine
from minisgl.config import EngineConfig

BASE: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "max_total_tokens": 8192,
    "max_running_requests": 24,
    "log_level": "warning",
}
# Of what differs in the prompts alone.
some_or_many = pytest.mark.parametrize("count", [80, pytest.param(500, marks=pytest.mark.thorough)])


def open_llm(side: str, **options: Any) -> LLM:
    """An engine that drafts whether it pays or not."""
    with patch("minisgl.build.DraftPolicy", lambda *_, **__: None):
        return LLM(**BASE | SIDES[side] | options)


@pytest.fixture(scope="module")
def sides() -> Iterator[dict[str, LLM]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(open_llm(name)) for name in SIDES}


def ask(llm: LLM, prompts: list[str], params: list[SamplingParams]) -> list[Any]:
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    return [output.outputs for output in llm.chat(chats, params, use_tqdm=False)]


def tokens(outputs: list[Any]) -> list[list[list[int]]]:
    return [[choice.token_ids for choice in choices] for choices in outputs]


def acceptance(llm: LLM, before: Any) -> float:
    after = llm.stats().scheduler
    accepted = after.num_accepted_drafts - before.num_accepted_drafts
    return accepted / (after.num_tried_drafts - before.num_tried_drafts)


@some_or_many
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_tokens_over_many_prompts(sides, temperature, count):
    """In fp32; acceptance of the draft model is at least 80 % on what the pair was made for."""
    prompts = questions(count, "chat")
    params = [SamplingParams(temperature=temperature, seed=i, max_tokens=12) for i in range(count)]
    plain = tokens(ask(sides["plain"], prompts, params))
    for name in ("draft", "ngram"):
        before = sides[name].stats().scheduler
        assert tokens(ask(sides[name], prompts, params)) == plain
        if name == "draft":
            assert acceptance(sides[name], before) > 0.8


@some_or_many
def test_the_same_tokens_over_many_prompts_in_fixed_orders(count):
    """In bf16, where only the batch-invariant mode promises it; every second prompt greedy."""
    prompts = questions(count, "chat")
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=12) for i in range(count)]
    said = []
    for name in ("plain", "draft"):
        with open_llm(name, batch_invariant=True, dtype="bfloat16") as llm:
            said.append(tokens(ask(llm, prompts, params)))
    assert said[0] == said[1]


FEATURES: dict[str, dict[str, Any]] = {
    "logprobs": {"logprobs": 3},
    "penalties": {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2},
    "filters": {"top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "choices": {"n": 2, "temperature": 1.2},
    "stop string": {"stop": ("e ", "1", "page")},
    "min_tokens": {"min_tokens": 25, "max_tokens": 40},
    "bias": {"logit_bias": {300: 2.0, 301: -100.0}},
    "prompt logprobs": {"prompt_logprobs": 1},
}


@pytest.mark.parametrize("name", ["draft", "ngram"])
def test_every_feature_is_the_same_with_drafts(sides, name):
    """Together in one batch; prompts of which half are cached."""
    prompts = questions(2 * len(FEATURES), "edit")
    params = [
        SamplingParams(**{"seed": i, "max_tokens": 40} | feature)
        for i, feature in enumerate([*FEATURES.values()] * 2)
    ]
    plain, drafted = ask(sides["plain"], prompts, params), ask(sides[name], prompts, params)
    assert tokens(drafted) == tokens(plain)
    for own, other in zip(drafted, plain, strict=True):
        for a, b in zip(own, other, strict=True):
            assert (a.text, a.finish_reason, a.stop_reason) == (
                b.text,
                b.finish_reason,
                b.stop_reason,
            )
            ids = [entry.token_id for entry in a.logprobs or []]
            assert ids == [entry.token_id for entry in b.logprobs or []]
            for x, y in zip(a.logprobs or [], b.logprobs or [], strict=True):
                assert x.logprob == pytest.approx(y.logprob, abs=1e-4)


CROWDED = {"chunked_prefill_size": 16, "max_total_tokens": 256, "max_running_requests": 12}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("draft", {"disable_overlap_schedule": True, "page_size": 1}),
        ("draft", CROWDED),
        ("draft", {"disable_radix_cache": True, "disable_cuda_graph": True}),
        ("draft", {"cascade_min_shared_tokens": 16, "page_size": 1}),
        ("ngram", CROWDED),
        ("ngram", {"disable_overlap_schedule": True, "disable_cuda_graph": True}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_every_setting_is_the_same_with_drafts(sides, name, options):
    """Overlap off; chunks, a pool too small and preemption; eager steps; a beginning
    read once for all. Several ranks are compared in tests/parallel."""
    prompts = questions(24, "chat", seed=5)
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=48) for i in range(24)]
    plain = tokens(ask(sides["plain"], prompts, params))
    with open_llm(name, **options) as llm:
        assert tokens(ask(llm, prompts, params)) == plain
        stats = llm.stats().scheduler
        share = 0.8 if name == "draft" else 0.05
        assert stats.num_accepted_drafts > share * stats.num_tried_drafts > 0
        if "max_total_tokens" in options:
            assert stats.num_preemptions > 0
        if "cascade_min_shared_tokens" in options:
            assert stats.num_spared_tokens > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 4096}, "must have the model's vocabulary of 2048, but .* has 4096"),
        ({"max_position_embeddings": 64}, "must have a context of at least 2048, but .* has 64"),
    ],
)
def test_a_draft_model_that_does_not_fit_is_refused(tmp_path, options, message):
    fields = json.loads((BUNDLED / "config.json").read_text()) | options
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = {"speculative_algorithm": "draft", "speculative_draft_model": str(tmp_path)}
    with pytest.raises(ValueError, match=f"speculative_draft_model {message}"):
        build_engine(EngineConfig(**BASE | config))


def test_a_draft_model_of_other_tokens_is_refused(tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((BUNDLED / name).read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"speculative_algorithm": "draft", "speculative_draft_model": str(tmp_path)}
    with pytest.raises(ValueError, match="must have the model's tokenizer, but the tokens of"):
        build_engine(EngineConfig(**BASE | config))
