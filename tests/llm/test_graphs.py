"""Steps that replay a graph and steps that do not give equal tokens and log-probabilities, bit for
bit, whatever the family, the width and the feature. On a CPU graphs are tapes, one for each number
of sequences and width, so they are recorded while requests come and go; and nothing on them is
called through Python, but for what is named here."""

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from benchmarks.speculative import SIDES
from minisgl import LLM, SamplingParams, csrc
from minisgl.core.request import TokenLogprobs
from minisgl.device import CpuDevice
from minisgl.device.tape import TapeGraph
from tests.llm.test_batch_invariant import folder_of, some_prompts
from tests.world import checkpoints

NATIVE = all(csrc.load(name, wait=True) is not None for name in ("model_ops", "rank_ops"))
FACTS = {"max_running_requests": 6, "max_total_tokens": 4096}
NGRAM = {"speculative_algorithm": "ngram", "speculative_num_draft_tokens": 3}
UNBUILT_HEADS = {"minisgl.kernels.decode.cpu.decode_twin"}  # of a size without native attention
EVERY_OP = {  # of such a model, in fp16
    f"minisgl.kernels.{name}"
    for name in (
        "activation.silu_and_mul_reference",
        "decode.cpu.decode_twin",
        "embedding.embedding_reference",
        "linear.linear_reference",
        "qkv_prepare.qkv_prepare_reference",
        "rmsnorm.rmsnorm_reference",
    )
}
UNPACKED_EXPERTS = {"minisgl.kernels.moe.cpu.moe_experts_twin"}  # panels hold bf16 and codes


def _params(index: int) -> SamplingParams:
    """Greedy and drawn; with penalties, biases and filters; with log-probabilities and without."""
    return SamplingParams(
        temperature=0.0 if index % 3 == 0 else 1.0,
        seed=index,
        max_tokens=10 + 4 * index,
        ignore_eos=index != 1,
        frequency_penalty=0.5 if index % 2 else 0.0,
        repetition_penalty=1.3 if index == 2 else 1.0,
        logit_bias={5: 2.0, 7: -3.0} if index == 4 else None,
        top_k=20 if index == 5 else 0,
        top_p=0.9 if index == 6 else 1.0,
        min_tokens=3 if index == 1 else 0,
        logprobs=2 if index == 3 else None,
    )


@contextmanager
def _tapes() -> Iterator[list[TapeGraph]]:
    """Yields a list of all tapes of this process that are made within the context."""
    made: list[TapeGraph] = []
    capture = CpuDevice.capture

    def kept(device: CpuDevice, function: Callable[[], object]) -> TapeGraph:
        made.append(capture(device, function))
        return made[-1]

    with patch.object(CpuDevice, "capture", kept):
        yield made


def _check(run: Callable[..., Any], called: set[str], **options: Any) -> None:
    """Graphs change nothing of what `run` returns, and tapes call this alone through Python."""
    with _tapes() as tapes:
        found = run(**options)
    assert found == run(disable_cuda_graph=True, **options)
    assert tapes
    if NATIVE:
        assert set().union(*(tape.calls for tape in tapes)) == called


def _run(folder: Path, **options: Any) -> list[tuple[list[int], list[TokenLogprobs] | None]]:
    prompts = some_prompts()
    prompts[0] = prompts[0] * 40  # which n-gram drafts follow
    params = [_params(index) for index in range(len(prompts))]
    options = {"device": "cpu", "load_format": "dummy", "log_level": "warning"} | options
    with LLM(folder, **options) as llm:
        first = llm.generate(prompts, params, use_tqdm=False)
        again = llm.generate(prompts[::-1], params[::-1], use_tqdm=False)
    outputs = [output.outputs[0] for output in (*first, *again)]
    return [(output.token_ids, output.logprobs) for output in outputs]


@pytest.mark.parametrize("options", [{}, NGRAM, {"cascade_min_shared_tokens": 16}], ids=str)
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("qwen3", "bfloat16"),
        ("qwen3-moe", "bfloat16"),
        ("gemma2", "bfloat16"),
        ("gemma2", "float32"),
        pytest.param("qwen3", "float32", marks=pytest.mark.thorough),
    ],
)
def test_graphs_change_no_bit(
    family: str, dtype: str, options: dict[str, Any], tmp_path: Path
) -> None:
    _check(partial(_run, folder_of(tmp_path, family)), set(), dtype=dtype, **FACTS | options)


@pytest.mark.parametrize(
    ("name", "head_dim", "called"),
    [
        ("llama3-biased-tied", 16, set()),
        ("mistral-window", 32, set()),
        ("qwen2-window-tied", 64, set()),
        ("qwen3-moe-mixed", 16, set()),
        ("gemma3", 16, set()),
        ("gemma3", 20, UNBUILT_HEADS),
    ],
)
def test_nor_do_graphs_of_other_families(
    name: str,
    head_dim: int,
    called: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(checkpoints.CHECKPOINTS[name][1], "head_dim", head_dim)
    checkpoints.make(name, tmp_path)
    facts = FACTS | {"dtype": "bfloat16", "load_format": "auto"}
    _check(partial(_run, tmp_path), called, **facts)


def test_nor_do_graphs_of_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of a vocabulary that they do not divide. What the other rank calls its log says."""
    facts = FACTS | NGRAM | {"dtype": "bfloat16", "tp_size": 2, "log_level": "debug"}
    _check(partial(_run, folder_of(tmp_path, "gemma2")), set(), **facts)
    log = capfd.readouterr().err
    assert "rank 1" in log
    assert not NATIVE or "recorded steps call" not in log


@pytest.mark.parametrize("options", [{}, {"quantization": "int8", "quantization_head": "int8"}])
def test_nor_do_graphs_of_a_draft_model_and_of_grammars(options: dict[str, Any]) -> None:
    forms = [None, {"regex": r"([a-z]{2,5}-){2}[0-9]{4}"}, {"json_object": True}]
    prompts = ["KV KV KV", "Describe the KV cache: ", "A"] * 3
    params = [
        SamplingParams(
            max_tokens=30,
            seed=i,
            temperature=i % 2,
            min_p=0.02 * (i // 4 % 2),
            structured_outputs=forms[i % 3],
            presence_penalty=0.5 * (i // 3 % 2),
        )
        for i in range(len(prompts))
    ]

    def run(**options: Any) -> list[list[int]]:
        options = FACTS | SIDES["draft"] | {"device": "cpu", "log_level": "warning"} | options
        with patch("minisgl.build.DraftPolicy", lambda *_, **__: None), LLM(**options) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert llm.stats().scheduler.num_accepted_drafts > 0
        return [output.outputs[0].token_ids for output in outputs]

    _check(run, set(), dtype="bfloat16", **options)


def test_nor_do_graphs_of_weights_in_codes(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "qwen3")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 96}
    (folder / "config.json").write_text(json.dumps(config))
    facts = FACTS | {"dtype": "bfloat16", "quantization": "int8", "quantization_head": "int8"}
    _check(partial(_run, folder), set(), **facts)


@pytest.mark.parametrize(
    ("family", "dtype", "called"),
    [("qwen3", "float16", EVERY_OP), ("qwen3-moe", "float32", UNPACKED_EXPERTS)],
)
def test_what_has_no_native_form_is_replayed_by_call(
    family: str, dtype: str, called: set[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And named when the engine starts. Products in fp16 depend on the rows beside a row: so
    without drafts, which pad steps."""
    facts = FACTS | {"dtype": dtype, "log_level": "info"}
    with caplog.at_level(logging.INFO, "minisgl"):
        _check(partial(_run, folder_of(tmp_path, family)), called, **facts)
    if NATIVE:
        text = next(text for text in caplog.messages if "no native form" in text)
        assert called <= set(text.rpartition(": ")[2].split(", "))
