"""The whole engine against transformers, which runs in a process of its own: greedy, fp32.

Batching, chunked prefill, prefix hits, partial pages and preemption are all in play; what comes
out must be, token for token, what transformers finds most likely after the same tokens.
"""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minisgl import LLM, SamplingParams
from tests.world.checkpoints import CHECKPOINTS, TINY

Ask = Callable[[dict[str, Any]], Any]
LENGTHS = (1, 16, 70, 97, 40)
OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "device": "cpu",
    "chunked_prefill_size": 24,
    "max_running_requests": 5,
    "max_total_tokens": 384,  # too few for all of them: some are preempted
    "log_level": "warning",
}


@pytest.fixture(scope="module")
def oracle() -> Iterator[Ask]:
    command = [sys.executable, "-m", "tests.llm.transformers_oracle"]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def ask(question: dict[str, Any]) -> Any:
            print(json.dumps(question), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


def prompts() -> list[list[int]]:
    """Random prompts; the last three share beginnings that end inside a page."""
    generator = random.Random(3)
    given = [[generator.randrange(3, TINY["vocab_size"]) for _ in range(n)] for n in LENGTHS]
    given[-1][:21] = given[-2][:21]
    given[-3][:35] = given[-2][:35]
    return given


def check(llm: LLM, ask: Ask, folder: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
    first = llm.generate(prompts(), params, use_tqdm=False)
    assert all(len(output.token_ids) == 64 for output in first)
    assert llm.stats().scheduler.num_preemptions > 0
    again = llm.generate(prompts()[-2:], params, use_tqdm=False)
    assert [output.token_ids for output in again] == [output.token_ids for output in first[-2:]]
    assert all(output.num_cached_tokens > 0 for output in again)
    sequences = [[output.prompt_token_ids, output.token_ids] for output in first]
    expected = ask({"folder": str(folder), "sequences": sequences})
    assert [output.token_ids for output in first] == expected


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_tokens_are_those_of_transformers(name: str, oracle: Ask, tmp_path: Path):
    oracle({"make": name, "folder": str(tmp_path)})
    with LLM(tmp_path, **OPTIONS) as llm:
        check(llm, oracle, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"disable_overlap_schedule": True},
        {"disable_cuda_graph": True, "page_size": 32},
        {"page_size": 1, "batch_policy": "decode-first"},
        {"chunked_prefill_size": 1000, "batch_policy": "prefill-first", "schedule_policy": "lpm"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_do_not_change_tokens(changes: dict[str, Any], oracle: Ask, tmp_path: Path):
    oracle({"make": "qwen3", "folder": str(tmp_path)})
    with LLM(tmp_path, **OPTIONS | changes) as llm:
        check(llm, oracle, tmp_path)


def test_a_seeded_request_gives_the_same_tokens_alone_or_in_any_batch(oracle: Ask, tmp_path: Path):
    oracle({"make": "llama2", "folder": str(tmp_path)})
    params = [
        SamplingParams(temperature=0.9, top_p=0.9, max_tokens=40, seed=1, ignore_eos=True),
        SamplingParams(temperature=1.3, top_k=20, max_tokens=30, seed=2, n=2),
        SamplingParams(min_p=0.05, repetition_penalty=1.2, max_tokens=50, seed=3, n=3),
        SamplingParams(presence_penalty=0.7, frequency_penalty=0.3, max_tokens=35, seed=2**64 - 1),
    ]
    given = prompts()[-4:]
    with LLM(tmp_path, **OPTIONS) as llm:
        together = llm.generate(given, params, use_tqdm=False)
    with LLM(tmp_path, **OPTIONS, disable_radix_cache=True, disable_overlap_schedule=True) as llm:
        for prompt, param, output in zip(given, params, together, strict=True):
            alone = llm.generate(prompt, param, use_tqdm=False)
            assert [c.token_ids for c in alone.outputs] == [c.token_ids for c in output.outputs]
