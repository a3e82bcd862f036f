"""The engine on a GPU gives the tokens it gives on a CPU, where both compute in fp32."""

import pytest

pytest.importorskip("msgspec")  # a machine for kernels alone may lack the engine's packages

from minisgl import LLM, SamplingParams

pytestmark = pytest.mark.gpu

PROMPTS = ["What is paged attention?", "Hello", "Once upon a time, there was", "What is 12 + 31?"]


def _tokens(device: str) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    with LLM(device=device, dtype="float32", max_total_tokens=4096) as llm:
        return [output.token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def test_same_tokens_as_on_cpu():
    assert _tokens("cuda") == _tokens("cpu")
