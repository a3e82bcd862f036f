"""Every family from a GGUF file against transformers, by one rank and by two."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from minisgl.config import Bits
from minisgl.gguf.blocks import first_infinite, grouped
from minisgl.gguf.header import read_gguf
from minisgl.kernels.grouped_linear.weights import Grouped
from minisgl.kernels.matrix import unpacked
from minisgl.layers.weights import Placement
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.models.loader import load_model
from minisgl.models.quantization import Quantization
from minisgl.parallel import Communicator
from tests.models.driver import Paged
from tests.models.test_parity import compare_fp32
from tests.models.test_ranks import Thread
from tests.world.gguf_files import CASES, make_gguf

CPU = torch.device("cpu")


def load(
    path: Path,
    comm: Communicator | None = None,
    dtype: torch.dtype = torch.float32,
    weights: Bits = "auto",
) -> Decoder:
    at = Placement(dtype, CPU, comm or Communicator())
    asked = Quantization(weights, weights)
    return load_model(ModelConfig.from_hf(path), path, at, quantization=asked)


@pytest.mark.parametrize("name", CASES)
def test_fp32_logits_and_greedy_tokens(name: str, tmp_path: Path) -> None:
    oracle = make_gguf(name, tmp_path / "model.gguf")
    compare_fp32(oracle, load(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    "kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1]
)
def test_of_rounded_weights(kind: Type, tmp_path: Path) -> None:
    oracle = make_gguf("llama2", tmp_path / "model.gguf", kind)
    compare_fp32(oracle, load(tmp_path / "model.gguf"))
    found = ModelConfig.from_hf(tmp_path / "model.gguf").dtype
    assert found == (torch.float16 if kind == Type.F16 else torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "kind"), [("llama2", Type.Q8_0), ("qwen3-moe", Type.Q4_1), ("gemma2", Type.F32)]
)
def test_two_ranks_equal_one(name: str, kind: Type, tmp_path: Path) -> None:
    """Of a row of 160 in blocks of 32 each rank has two blocks and a half."""
    path, size = tmp_path / "model.gguf", 2
    make_gguf(name, path, kind)
    desk: list[torch.Tensor | None] = [None] * size
    barrier = threading.Barrier(size)
    prompt = {0: torch.randint(3, 211, (30,), generator=torch.manual_seed(3)).tolist()}

    def logits(comm: Communicator) -> torch.Tensor:
        return Paged(load(path, comm), 1, 30).prefill(prompt, chunk=11)[0]

    with ThreadPoolExecutor(size) as pool:
        parts = list(pool.map(logits, (Thread(r, size, True, desk, barrier) for r in range(size))))
    torch.testing.assert_close(parts[0], logits(Communicator()), atol=1e-4, rtol=0)


def test_weights_are_copied_in_pieces_of_any_size(tmp_path: Path, monkeypatch) -> None:
    """Pieces of 7 rows cut through the heads whose rows change places."""
    path = tmp_path / "model.gguf"
    make_gguf("llama2", path, Type.Q8_0)
    whole = matrices(load(path))
    monkeypatch.setattr("minisgl.models.filling.PIECE", 7 * 96)
    monkeypatch.setattr("minisgl.models.filling.ROUNDED", 7 * 96)
    for weight, same in zip(matrices(load(path)), whole, strict=True):
        torch.testing.assert_close(weight, same, rtol=0, atol=0)


def matrices(decoder: Decoder) -> list[torch.Tensor]:
    parts = [(layer.attention.qkv, layer.attention.out) for layer in decoder.layers]
    return [unpacked(part.weight) for pair in parts for part in pair]


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0])
def test_codes_are_the_weights_to_the_bit(kind: Type, tmp_path: Path) -> None:
    make_gguf("llama2", path := tmp_path / "model.gguf", kind)
    at, config = Placement(torch.float32, CPU), ModelConfig.from_hf(path)
    kept = load(path)
    floats = load_model(config, path, at, quantization=Quantization("none", "none"))
    for held, weight in zip(matrices(kept), matrices(floats), strict=True):
        assert torch.equal(held, weight)
    assert not isinstance(kept.layers[0].attention.qkv.weight, torch.Tensor)
    assert kept.weight_bytes < floats.weight_bytes


def test_blocks_of_256_are_the_weights_to_the_bit_but_of_q6_k() -> None:
    """Of random bytes, with numbers of fp16 where scales are."""
    rng = np.random.default_rng(0)
    for name, halves in (("Q4_K", (0, 2)), ("Q5_K", (0, 2)), ("Q6_K", (208,))):
        kind = Type[name]
        stored = rng.integers(0, 256, (5, 3, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
        for at in halves:
            numbers = rng.normal(size=(5, 3, 1)).astype("<f2")
            stored[..., at : at + 2] = numbers.view(np.uint8)
        rows = stored.reshape(5, -1)
        found = Grouped(*map(torch.from_numpy, grouped(rows, kind))).dequantized()
        exact = torch.from_numpy(gguf.dequantize(rows, kind))
        error = ((found - exact).square().mean() / exact.square().mean()).sqrt()
        assert error == 0 if name != "Q6_K" else 0 < error < 0.006


@pytest.mark.parametrize("weights", ["auto", "none"])
@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(("kind", "first"), [(Type.Q8_0, 0), (Type.Q4_0, 0), (Type.Q4_1, 2)])
def test_scales_that_are_no_numbers_are_refused(
    kind: Type, first: int, wrong: float, weights: Bits, tmp_path: Path
) -> None:
    make_gguf("llama2", path := tmp_path / "model.gguf", kind)
    info = read_gguf(path).tensors["blk.1.attn_k.weight"]
    with path.open("r+b") as file:
        file.seek(info.start + 5 * info.row_bytes + 2 * gguf.GGML_QUANT_SIZES[kind][1] + first)
        file.write(np.array(wrong, "<f2").tobytes())
    where = rf"blk\.1\.attn_k\.weight has a scale or minimum of {wrong:g} in block 2 of row 5"
    with pytest.raises(ValueError, match=where):
        load(path, weights=weights)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
def test_every_scale_is_looked_at(name: str) -> None:
    """Each half in turn that makes a weight infinite or no number, among all halves of a block."""
    kind = Type[name]
    stored = np.ones((3, 2, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    assert first_infinite(stored.reshape(3, -1), kind) is None
    for at in range(0, stored.shape[-1], 2):
        changed = stored.copy()
        changed[2, 1, at : at + 2] = 0, 0x7C
        rows = changed.reshape(3, -1)
        with np.errstate(all="ignore"):
            finite = np.isfinite(gguf.dequantize(rows, kind)).all()
        assert first_infinite(rows, kind) == (None if finite else (2, 1, np.inf))
