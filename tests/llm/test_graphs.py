"""Steps that replay a graph and steps that do not give equal tokens and log-probabilities, bit for
bit, whatever the family, the width and the feature. On a CPU graphs are tapes, one for each number
of sequences and width, so they are recorded while requests come and go."""

import json
from pathlib import Path
from typing import Any

import pytest

from minisgl import LLM, SamplingParams
from minisgl.core.request import TokenLogprobs
from tests.llm.test_batch_invariant import folder_of, some_prompts
from tests.world import checkpoints

NGRAM = {"speculative_algorithm": "ngram", "speculative_num_draft_tokens": 3}


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
        ("qwen3", "float32"),
        ("qwen3-moe", "bfloat16"),
        ("gemma2", "bfloat16"),
    ],
)
def test_graphs_change_no_bit(
    family: str, dtype: str, options: dict[str, Any], tmp_path: Path
) -> None:
    folder = folder_of(tmp_path, family)
    facts = {"dtype": dtype, "max_running_requests": 6, "max_total_tokens": 4096} | options
    assert _run(folder, **facts) == _run(folder, disable_cuda_graph=True, **facts)


@pytest.mark.parametrize(
    "name", ["llama3-biased-tied", "mistral-window", "qwen2-window-tied", "gemma3"]
)
def test_nor_do_graphs_of_other_families(name: str, tmp_path: Path) -> None:
    checkpoints.make(name, tmp_path)
    facts = {"dtype": "bfloat16", "max_running_requests": 6, "max_total_tokens": 4096}
    facts["load_format"] = "auto"
    assert _run(tmp_path, **facts) == _run(tmp_path, disable_cuda_graph=True, **facts)


def test_nor_do_graphs_of_weights_in_codes(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "qwen3")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 96}
    (folder / "config.json").write_text(json.dumps(config))
    facts = {"dtype": "bfloat16", "max_running_requests": 6, "max_total_tokens": 4096}
    facts |= {"quantization": "int8", "quantization_head": "int8"}
    assert _run(folder, **facts) == _run(folder, disable_cuda_graph=True, **facts)


def test_what_has_no_native_form_is_replayed_by_call(tmp_path: Path) -> None:
    """fp16, whose products depend on the rows beside a row: so without drafts, which pad steps."""
    folder = folder_of(tmp_path, "qwen3")
    facts = {"dtype": "float16", "max_running_requests": 6, "max_total_tokens": 4096}
    assert _run(folder, **facts) == _run(folder, disable_cuda_graph=True, **facts)
