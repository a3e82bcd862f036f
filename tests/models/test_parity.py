"""Every family against transformers: logits in fp32, greedy tokens, and bf16's error."""

from pathlib import Path

import pytest
import torch

from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.models.loader import load_model
from tests.models.checkpoints import CHECKPOINTS, make
from tests.models.driver import Paged

STEPS = 64
LENGTHS = (37, 5, 21)


def prompts(vocab_size: int) -> dict[int, list[int]]:
    generator = torch.Generator().manual_seed(7)
    return {
        s: torch.randint(3, vocab_size, (n,), generator=generator).tolist()
        for s, n in enumerate(LENGTHS)
    }


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    config = ModelConfig.from_hf(folder)
    return load_model(config, folder, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fp32_logits_and_greedy_tokens(name: str, tmp_path: Path) -> None:
    oracle = make(name, tmp_path)
    decoder = load(tmp_path)
    given = prompts(decoder.config.vocab_size)
    paged = Paged(decoder, len(given), max(LENGTHS) + STEPS)
    ours = paged.prefill(given, chunk=8)
    texts = {s: list(prompt) for s, prompt in given.items()}
    last = [logits[-1] for logits in ours]
    for _ in range(STEPS):
        work = {s: [int(logits.argmax())] for s, logits in enumerate(last)}
        for s, tokens in work.items():
            texts[s] += tokens
        decoded = paged.step(work, num_decode=len(work))
        last = [logits[-1] for logits in decoded]
        ours = [torch.cat(pair) for pair in zip(ours, decoded, strict=True)]
    for s, text in texts.items():
        with torch.no_grad():
            theirs = oracle(torch.tensor([text])).logits[0]
        assert theirs.std() > 0.3  # large enough for the tolerance to mean something
        torch.testing.assert_close(ours[s], theirs, atol=1e-4, rtol=0)
        start = len(given[s])
        assert theirs[start - 1 : -1].argmax(-1).tolist() == text[start:]
