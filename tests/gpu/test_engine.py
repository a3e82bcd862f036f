"""The engine on a GPU gives the tokens it gives on a CPU, where both compute in fp32."""

from typing import Any

import pytest
import torch

# A machine for kernels alone may lack the engine's packages.
pytest.importorskip("triton")
pytest.importorskip("msgspec")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("zmq")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from minisgl import LLM, SamplingParams

pytestmark = pytest.mark.gpu

PROMPTS = ["What is paged attention?", "Hello", "Once upon a time, there was", "What is 12 + 31?"]


def _tokens(device: str, ranks: int = 1, **config: Any) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True)
    facts: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 4096} | config
    with LLM(device=device, tp_size=ranks, **facts) as llm:
        return [output.token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False)]


def test_same_tokens_as_on_cpu(device_type: str) -> None:
    assert _tokens(device_type) == _tokens("cpu")


def test_same_tokens_as_on_cpu_with_weights_of_8_bits(device_type: str) -> None:
    """Rounding to 8 bits has one answer, so that both compute with the same codes."""
    assert _tokens(device_type, quantization="int8") == _tokens("cpu", quantization="int8")


def test_same_tokens_with_cascade_groups_and_without(device_type: str) -> None:
    """Eager and in graphs; on a GPU groups are planned where their prefix is long enough."""
    system = "You are a helpful assistant of a small engine. Be brief. " * 12
    prompts = [f"{system}\nQuestion {n}: {prompt}" for n in range(4) for prompt in PROMPTS]
    params = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)

    def tokens(**config: Any) -> list[list[int]]:
        with LLM(device=device_type, dtype="float32", max_total_tokens=16384, **config) as llm:
            llm.generate(prompts[:1], params, use_tqdm=False)
            answers = [o.token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
            spared = llm.stats().scheduler.num_spared_tokens
            assert (spared > 0) == ("cascade_min_shared_tokens" in config)
            return answers

    plain = tokens(disable_cascade=True)
    assert tokens(cascade_min_shared_tokens=64) == plain
    assert tokens(cascade_min_shared_tokens=64, disable_cuda_graph=True) == plain


@pytest.mark.usefixtures("gpu_only")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU for each rank")
def test_same_tokens_on_two_gpus() -> None:
    assert _tokens("cuda", ranks=2) == _tokens("cuda")
