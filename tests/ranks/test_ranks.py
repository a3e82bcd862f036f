"""Several ranks, each a process, give the tokens that one gives: every family, whatever happens."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from minisgl import LLM
from minisgl.build import build_engine
from minisgl.config import EngineConfig
from minisgl.core.request import Request, SamplingParams
from minisgl.engine.engine import Engine
from tests.ranks.processes import children
from tests.world.checkpoints import make
from tests.world.requests import mixed_requests

# Small pools and chunks: prompts come in pieces, and not all that are admitted fit to the end.
TIGHT = {
    "device": "cpu",
    "dtype": "float32",
    "page_size": 16,
    "max_total_tokens": 10 * 16,
    "max_running_requests": 6,
    "chunked_prefill_size": 24,
}


IN_PIECES = {"piecewise_cuda_graph_max_tokens": 23}  # some steps have more tokens
DRAFTING = {"speculative_algorithm": "draft", "speculative_draft_model": "tiny-draft"}


def serve(engine: Engine, vocab: int) -> dict[tuple[str, int], list[int]]:
    """The tokens of all choices. One request is aborted on its way, and left out."""
    tokens: dict[tuple[str, int], list[int]] = {}
    waiting = mixed_requests(9, seed=7, max_tokens=45, vocab=vocab)
    doomed = Request("doomed", [9] * 40, SamplingParams(max_tokens=60, temperature=0.0, seed=1))
    waiting.insert(3, doomed)
    while waiting or engine.has_work():
        if waiting:
            engine.add(waiting.pop(0))
        for delta in engine.step():
            assert delta.error is None, delta.error
            tokens.setdefault((delta.request_id, delta.choice), []).extend(delta.token_ids)
        if len(tokens.get(("doomed", 0), ())) == 5:
            engine.abort("doomed")
            tokens["doomed", 0].append(-1)
    assert engine.failure is None
    del tokens["doomed", 0]
    return tokens


def tokens_of(ranks: int, model: Path | None, **options: Any) -> dict[tuple[str, int], list[int]]:
    before = children()
    config = EngineConfig(
        model=None if model is None else str(model), tp_size=ranks, **(TIGHT | options)
    )
    with patch("minisgl.build.DraftPolicy", lambda *_, **__: None):
        engine = build_engine(config)  # that drafts whether it pays or not
    try:
        assert len(children() - before) >= ranks - 1
        tokens = serve(engine, engine.info.limits.vocab_size)
        stats = engine.stats().scheduler
        assert stats.num_preemptions > 0
        assert stats.num_hit_tokens > 0
        assert (stats.num_drafts > 0) == ("speculative_algorithm" in options)
    finally:
        engine.close()
    assert children() <= before
    return tokens


# How each family is split is in tests/models/test_ranks.py too, without processes.
FAMILIES = [
    "llama3-biased-tied",
    "qwen3-moe-mixed",
    "gemma3",
    pytest.param("mistral-window", marks=pytest.mark.thorough),
    pytest.param("qwen2-window-tied", marks=pytest.mark.thorough),
    pytest.param("qwen3-yarn-biased", marks=pytest.mark.thorough),
    pytest.param("gemma2", marks=pytest.mark.thorough),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_give_the_tokens_of_one(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)  # 211 tokens: the last rank holds a padding row
    want = tokens_of(1, tmp_path)
    assert tokens_of(2, tmp_path) == want
    assert tokens_of(1, tmp_path, **IN_PIECES) == want


@pytest.fixture(scope="module")
def bundled() -> dict[tuple[str, int], list[int]]:
    return tokens_of(1, None)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        # When debugging, every step is compared between the ranks.
        (2, {"log_level": "debug", "speculative_algorithm": "ngram"}),
        (2, DRAFTING | {"log_level": "debug"}),
        (2, IN_PIECES | {"log_level": "debug"}),
        pytest.param(
            2,
            {"disable_overlap_schedule": True, "disable_cuda_graph": True},
            marks=pytest.mark.thorough,
        ),
        pytest.param(4, {}, marks=pytest.mark.thorough),  # two ranks to a key head
    ],
)
def test_the_bundled_model_is_the_same_on_several_ranks(
    bundled: dict[tuple[str, int], list[int]],
    ranks: int,
    options: dict[str, Any],
) -> None:
    assert tokens_of(ranks, None, **options) == bundled


@pytest.mark.thorough
def test_two_ranks_draft_in_fixed_orders() -> None:
    options = {"batch_invariant": True, "dtype": "bfloat16", "max_total_tokens": 8 * 16}
    assert tokens_of(2, None, **options, **DRAFTING) == tokens_of(2, None, **options)


def test_two_ranks_are_batch_invariant_and_profiled(tmp_path: Path) -> None:
    options = TIGHT | {"dtype": "bfloat16", "max_total_tokens": 1024}
    with LLM(tp_size=2, batch_invariant=True, profile_dir=str(tmp_path), **options) as llm:
        params = SamplingParams(max_tokens=20, temperature=0.0, logprobs=1)
        prompts = [request.prompt_token_ids for request in mixed_requests(9, seed=7, vocab=2048)]
        together = llm.generate(prompts, params, use_tqdm=False)
        for prompt, beside in zip(prompts[:3], together, strict=False):
            alone = llm.generate(prompt, params, use_tqdm=False)
            assert alone.token_ids == beside.token_ids
            assert alone.outputs[0].logprobs == beside.outputs[0].logprobs
        llm.start_profile()
        llm.generate([5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
        _, *traces = llm.stop_profile()
        assert [Path(trace).name for trace in traces] == [
            "rank0.trace.json.gz",
            "rank1.trace.json.gz",
        ]
        layers = 5
        for trace in traces:
            events = json.loads(gzip.decompress(Path(trace).read_bytes()))["traceEvents"]
            names = Counter(e["name"] for e in events if e.get("cat") == "user_annotation")
            assert names["forward"] == names["broadcast"] == 3
            assert names["layer 0"] == names[f"layer {layers - 1}"] == 3
            assert names["all_reduce"] == 3 * (2 * layers + 1)  # and the embedding's
