"""The engine with prompts computed by the Gluon kernel. Apart: no interpreter has run it."""

import json
from pathlib import Path

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
from minisgl.models.presets import decoder

pytestmark = pytest.mark.gpu
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.usefixtures("gpu_only")
@pytest.mark.skipif(not HOPPER, reason="the Gluon kernel is for sm_90")
def test_gluon_scores_prompts_as_triton_does(tmp_path: Path) -> None:
    """Prompts of one to five chunks, by a made-up model in bf16."""
    facts = decoder("Llama", 2, 512, 8, 2, 128, 1024, 1000, max_position_embeddings=2048)
    facts |= {"rope_theta": 10_000.0, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    prompts = [[3 + (i * i + n) % 900 for i in range(300 + 211 * n)] for n in range(4)]
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, prompt_logprobs=0)

    def scores(backend: str) -> torch.Tensor:
        with LLM(
            tmp_path,
            attention_backend=backend,
            load_format="dummy",
            dtype="bfloat16",
            device="cuda",
            max_total_tokens=8192,
            chunked_prefill_size=256,
        ) as llm:
            asked = [*prompts, prompts[-1] + prompts[0]]
            outputs = llm.generate(asked, params, use_tqdm=False)
        return torch.tensor([x.logprob for o in outputs for x in o.prompt_logprobs or []])

    torch.testing.assert_close(scores("gluon"), scores("triton"), atol=0.05, rtol=0.0)
