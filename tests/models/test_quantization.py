"""Weights rounded while they are loaded: which, to what, and that ranks agree."""

import threading
from concurrent.futures import ThreadPoolExecutor
from math import gcd
from pathlib import Path

import pytest
import torch

from minisgl.config import EngineConfig
from minisgl.kernels.grouped_linear.weights import quantized
from minisgl.kernels.matrix import unpacked
from minisgl.layers.weights import Placement
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.models.loader import load_model
from minisgl.models.quantization import Quantization
from minisgl.parallel import Communicator
from minisgl.start.facts import quantization_of
from tests.models.driver import Paged
from tests.models.test_ranks import Thread
from tests.world.checkpoints import CHECKPOINTS, make
from tests.world.int_checkpoints import make_int

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sizes = {"hidden_size": 96, "intermediate_size": 192, "head_dim": 32}
    monkeypatch.setitem(CHECKPOINTS, "wide", ("Qwen3", sizes))
    make("wide", tmp_path)
    return tmp_path


def load(
    folder: Path, asked: Quantization, comm: Communicator | None = None, files: bool = True
) -> Decoder:
    at = Placement(torch.float32, CPU, comm or Communicator())
    path = folder if files else None
    return load_model(ModelConfig.from_hf(folder), path, at, quantization=asked)


@pytest.mark.parametrize("files", [True, False])
@pytest.mark.parametrize(("asked", "bits"), [("int8", 8), ("int4", 4)])
def test_matrices_are_rounded_and_nothing_else(
    folder: Path, asked: str, bits: int, files: bool
) -> None:
    floats = load(folder, Quantization(), files=files)
    rounded = load(folder, Quantization(asked, "none", 64), files=files)
    for one, other in zip(floats.layers, rounded.layers, strict=True):
        for exact, held in (
            (one.attention.qkv.weight, other.attention.qkv.weight),
            (one.mlp.gate_up.weight, other.mlp.gate_up.weight),
            (one.mlp.down.weight, other.mlp.down.weight),
        ):
            wanted = quantized(exact, bits, gcd(64, exact.shape[1]))  # of 96 inputs 32
            assert torch.equal(unpacked(held), wanted.dequantized())
        assert torch.equal(one.mlp_norm.weight, other.mlp_norm.weight)
    assert torch.equal(floats.embedding.weight, rounded.embedding.weight)


def test_the_head_has_a_choice_of_its_own(folder: Path) -> None:
    floats = load(folder, Quantization())
    rounded = load(folder, Quantization("auto", "int8"))
    for one, other in ((floats.head, rounded.head), (floats.embedding, rounded.embedding)):
        wanted = quantized(one.weight, 8, 32).dequantized()
        assert torch.equal(unpacked(other.weight), wanted)
    assert torch.equal(floats.layers[0].mlp.down.weight, rounded.layers[0].mlp.down.weight)


@pytest.mark.parametrize("asked", ["int8", "int4"])
def test_two_ranks_equal_one(folder: Path, asked: str) -> None:
    size, prompt = 2, {0: list(range(3, 33))}
    desk: list[torch.Tensor | None] = [None] * size
    barrier = threading.Barrier(size)

    def logits(comm: Communicator) -> torch.Tensor:
        decoder = load(folder, Quantization(asked, asked), comm)
        return Paged(decoder, 1, 30).prefill(prompt, chunk=11)[0]

    with ThreadPoolExecutor(size) as pool:
        parts = list(pool.map(logits, (Thread(r, size, True, desk, barrier) for r in range(size))))
    torch.testing.assert_close(parts[0], logits(Communicator()), atol=1e-4, rtol=0)


def test_what_stays_in_floats_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make("qwen3-moe", tmp_path)
    load(tmp_path, Quantization("int8"))
    said = [record.message for record in caplog.records]
    assert any("layers.0.self_attn.q_proj and" in line and "48 inputs" in line for line in said)
    assert any("experts.0.down_proj and" in line and "40 inputs" in line for line in said)


def test_what_was_asked_for_in_vain_is_said(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(folder, Quantization("auto", "auto"))
    assert caplog.messages == ["quantization auto: the checkpoint has no weights in codes"]
    caplog.clear()
    load(folder, Quantization("int8"))
    assert not caplog.messages
    make_int("int8", tmp_path)
    load(tmp_path, Quantization("int4"))
    said = "nothing is rounded, as the checkpoint's matrices are in codes already and stay so"
    assert said in caplog.messages[-1]


@pytest.mark.parametrize("int8", [True, False])
def test_that_activations_are_rounded_is_said(
    int8: bool, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="minisgl")
    load(folder, Quantization(int8_activations=int8))
    assert not caplog.messages
    load(folder, Quantization("int8", int8_activations=int8))
    said = [line for line in caplog.messages if "--quantized-activations none" in line]
    assert len(said) == int8


def test_what_flags_ask_for() -> None:
    def of(
        dtype: torch.dtype = torch.bfloat16, device: str = "cpu", **flags: object
    ) -> Quantization:
        return quantization_of(EngineConfig(**flags), dtype, torch.device(device))  # type: ignore[arg-type]

    assert of() == Quantization("none", "none", 32, True)
    assert of(quantization="auto") == Quantization("auto", "auto", 32, True)
    assert of(quantization="int4").head == "int8"
    assert of(quantization="int4", quantization_head="none").head == "none"
    assert of(quantization="int4", quantization_group=128).group == 128
    assert not of(quantized_activations="none").int8_activations
    assert not of(torch.float32).int8_activations
    with pytest.raises(ValueError, match="quantized_activations int8 needs a CPU and bfloat16"):
        of(torch.float32, quantization="int8", quantized_activations="int8")
    assert of(device="cuda", quantization="int4") == Quantization("int4", "int8", 32, False)
    with pytest.raises(ValueError, match="quantized_activations int8 needs a CPU and bfloat16"):
        of(device="cuda", quantization="int8", quantized_activations="int8")
    for head in ("auto", "none"):
        with pytest.raises(ValueError, match=r"quantized_activations int8 needs .*'none' and"):
            EngineConfig(quantized_activations="int8", quantization_head=head)  # type: ignore[arg-type]
    assert EngineConfig(quantized_activations="int8", quantization_head="int8").keeps_codes
    with pytest.raises(ValueError, match="quantization_group needs quantization or"):
        EngineConfig(quantization_group=32)
    with pytest.raises(ValueError, match=r"quantization_group must be one of .*, got 48"):
        EngineConfig(quantization="int8", quantization_group=48)
