"""Every family against transformers: logits in fp32, greedy tokens, and bf16's error."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from minisgl import csrc
from minisgl.layers.weights import Placement
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.models.loader import load_model
from tests.models.driver import Paged
from tests.world.checkpoints import CHECKPOINTS, make

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
    return load_model(config, folder, Placement(dtype, torch.device("cpu")))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fp32_logits_and_greedy_tokens(name: str, tmp_path: Path) -> None:
    check_fp32(name, tmp_path)


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_without_native_ops(name: str, tmp_path: Path) -> None:
    with patch.object(csrc, "load", lambda _: None):
        check_fp32(name, tmp_path)


@pytest.mark.parametrize("absent", [True, False], ids=["absent", "null"])
def test_a_mistral_whose_config_says_no_head_dim(absent: bool, tmp_path: Path) -> None:
    oracle = make("mistral-full", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("head_dim", 8) == 8
    (tmp_path / "config.json").write_text(
        json.dumps(config if absent else config | {"head_dim": None})
    )
    compare_fp32(oracle, load(tmp_path))


def test_gemma3_weights_by_the_names_of_newer_checkpoints(tmp_path: Path) -> None:
    """transformers keeps writing the names of its first Gemma 3, and reads these too."""
    oracle = make("gemma3-multimodal", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix("language_model.model.")
        renamed[f"model.{name}" if inner == name else f"model.language_model.{inner}"] = tensor
    assert not renamed.keys() & tensors.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    compare_fp32(oracle, load(tmp_path))


def check_fp32(name: str, tmp_path: Path) -> None:
    compare_fp32(make(name, tmp_path), load(tmp_path))


def compare_fp32(oracle: torch.nn.Module, decoder: Decoder) -> None:
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


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_bf16_error_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    """Against fp32 with the same (bf16) weights, ours is at most twice theirs."""
    theirs = make(name, tmp_path).bfloat16()
    decoder = load(tmp_path, torch.bfloat16)
    given = prompts(decoder.config.vocab_size)
    paged = Paged(decoder, len(given), max(LENGTHS), dtype=torch.bfloat16)
    ours = torch.cat(paged.prefill(given, chunk=16))
    with torch.no_grad():
        rough = torch.cat([theirs(torch.tensor([p])).logits[0].float() for p in given.values()])
        exact_model = theirs.float()
        exact = torch.cat([exact_model(torch.tensor([p])).logits[0] for p in given.values()])
    # Root mean square, so that an expert chosen differently on a near tie weighs little.
    ours_error = (ours - exact).square().mean().sqrt()
    assert ours_error <= 2 * (rough - exact).square().mean().sqrt()


@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
@pytest.mark.parametrize("page_size", [1, 16])
def test_a_step_mixes_decodes_drafts_and_chunks(name: str, page_size: int, tmp_path: Path) -> None:
    """The same tokens computed in other company and other pieces give the same logits."""
    make(name, tmp_path)
    decoder = load(tmp_path)
    texts = prompts(decoder.config.vocab_size)
    whole = Paged(decoder, 3, 64, page_size=page_size).prefill(texts, chunk=64)
    paged = Paged(decoder, 3, 64, page_size=page_size, seed=1)
    pieces: dict[int, list[torch.Tensor]] = {s: [] for s in texts}

    def step(counts: dict[int, int], num_decode: int) -> None:
        work = {s: texts[s][paged.lengths[s] :][:n] for s, n in counts.items()}
        for s, logits in zip(work, paged.step(work, num_decode), strict=True):
            pieces[s].append(logits)

    step({0: 3, 1: 3}, 0)
    step({1: 1, 0: 1, 2: 10}, 2)
    step({0: 17}, 0)
    step({0: 4, 2: 4}, 2)  # drafts
    step({2: 1, 0: 12}, 1)
    step({1: 1}, 1)
    step({2: 6}, 0)
    for s, expected in enumerate(whole):
        torch.testing.assert_close(torch.cat(pieces[s]), expected, atol=1e-4, rtol=0)
