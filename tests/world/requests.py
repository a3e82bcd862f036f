"""Requests as many users send them at once: shared prefixes, every sampling feature somewhere."""

import numpy as np

from minisgl.core.request import Request, SamplingParams
from tests.world.configs import VOCAB


def mixed_requests(
    count: int, seed: int, *, max_tokens: int = 12, vocab: int = VOCAB
) -> list[Request]:
    """Prompts that share prefixes, every sampling feature somewhere."""
    generator = np.random.default_rng(seed)
    stem = generator.integers(2, vocab, 45).tolist()
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 12},
        {"temperature": 1.3, "top_p": 0.8, "logprobs": 3},
        {"temperature": 0.0, "repetition_penalty": 1.4, "logprobs": 0},
        {"temperature": 1.0, "frequency_penalty": 0.6, "presence_penalty": 0.4, "n": 2},
        {"temperature": 1.0, "min_p": 0.05, "prompt_logprobs": 2},
        {"temperature": 0.9, "logit_bias": {7: 2.0, 9: -100.0}, "min_tokens": 5},
    ]
    requests = []
    for i in range(count):
        own = generator.integers(2, vocab, int(generator.integers(1, 20))).tolist()
        prompt = stem[: int(generator.integers(0, 45))] + own
        params = SamplingParams(max_tokens=max_tokens, seed=1000 + i, **kinds[i % len(kinds)])
        requests.append(Request(f"r{i}", prompt, params))
    return requests


def shared_requests(count: int, seed: int) -> list[Request]:
    """Two stems, one a continuation of the other, and mixed prompts with none of them."""
    generator = np.random.default_rng(seed)
    stem = generator.integers(2, VOCAB, 50).tolist()
    requests = mixed_requests(3, seed)
    for i in range(count):
        own = generator.integers(2, VOCAB, int(generator.integers(1, 9))).tolist()
        params = SamplingParams(max_tokens=12 + i, seed=i, temperature=0.8, ignore_eos=True)
        requests.append(Request(f"s{i}", stem[: 50 if i % 3 else 33] + own, params))
    return requests
