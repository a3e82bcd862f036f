"""Checkpoints of GPTQ, AWQ and compressed-tensors: what they stand for, and what is refused."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

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
from tests.world.int_checkpoints import FORMATS, make_int


def load(folder: Path, comm: Communicator | None = None, weights: Any = "auto") -> Decoder:
    at = Placement(torch.float32, torch.device("cpu"), comm or Communicator())
    config = ModelConfig.from_hf(folder)
    return load_model(config, folder, at, quantization=Quantization(weights))


@pytest.mark.parametrize("name", FORMATS)
def test_every_weight_is_what_its_codes_stand_for(name: str, tmp_path: Path) -> None:
    oracle = make_int(name, tmp_path)
    kept, floats = load(tmp_path), load(tmp_path, weights="none")
    for index, layer in enumerate(kept.layers):
        theirs, mlp = oracle.model.layers[index], floats.layers[index].mlp
        gate_up = torch.cat((theirs.mlp.gate_proj.weight, theirs.mlp.up_proj.weight))
        for linear, weight in (
            (layer.mlp.gate_up, gate_up),
            (layer.mlp.down, theirs.mlp.down_proj.weight),
        ):
            assert not isinstance(linear.weight, torch.Tensor)
            torch.testing.assert_close(unpacked(linear.weight), weight.data, rtol=0, atol=1e-7)
        torch.testing.assert_close(mlp.gate_up.weight, gate_up.data, rtol=0, atol=1e-7)
    assert isinstance(kept.head.weight, torch.Tensor)
    compare_fp32(oracle, kept)


@pytest.mark.parametrize("name", ["gptq-4", "awq", "int4-zeros", "int8"])
def test_two_ranks_equal_one(name: str, tmp_path: Path) -> None:
    """Of down's 160 inputs in groups of 32 each rank has two groups and a half: it is in floats."""
    make_int(name, tmp_path)
    size, prompt = 2, {0: list(range(3, 33))}
    desk: list[torch.Tensor | None] = [None] * size
    barrier = threading.Barrier(size)

    def logits(comm: Communicator) -> torch.Tensor:
        decoder = load(tmp_path, comm)
        kinds = [
            type(part.weight)
            for part in (decoder.layers[0].mlp.gate_up, decoder.layers[0].mlp.down)
        ]
        assert [kind is torch.Tensor for kind in kinds] == [False, comm.size > 1]
        return Paged(decoder, 1, 30).prefill(prompt, chunk=11)[0]

    with ThreadPoolExecutor(size) as pool:
        parts = list(pool.map(logits, (Thread(r, size, True, desk, barrier) for r in range(size))))
    torch.testing.assert_close(parts[0], logits(Communicator()), atol=1e-4, rtol=0)


def test_a_matrix_may_lie_in_several_files(tmp_path: Path) -> None:
    oracle = make_int("gptq-4", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        own = {name: tensors[name] for name in names}
        save_file(own, tmp_path / f"model-{number}.safetensors")
    compare_fp32(oracle, load(tmp_path))


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gptq-4", {"quant_method": "bitsandbytes"}, r"quant_method must be one of .*'bitsandbytes'"),
    ("gptq-4", {"quant_method": "fp8"}, "quant_method must be one of .*'fp8'"),
    ("gptq-4", {"bits": 3}, "bits must be 4 or 8, got 3"),
    ("gptq-4", {"desc_act": True}, "desc_act must be False, got True"),
    ("gptq-4", {"checkpoint_format": "marlin"}, "checkpoint_format must be .*'marlin'"),
    ("gptq-4", {"dynamic": {"-:.*": {}}}, "dynamic must be None"),
    ("gptq-4", {"format": "bitblas"}, "format must be None or 'gptq' .*, got 'bitblas'"),
    ("gptq-4", {"format": "gptq", "checkpoint_format": "gptq_v2"}, "format must be as .*'gptq_v2'"),
    ("gptq-4", {"group_size": 48}, "group_size must be a multiple of 32, or -1, got 48"),
    ("gptq-4", {"group_size": 64}, "in 5 groups.*groups of 64"),
    ("awq", {"bits": 8}, "bits must be 4, got 8"),
    ("awq", {"version": "gemv"}, "version must be .*'gemv'"),
    ("awq", {"format": "gemv"}, "format must be .*'gemv'"),
    ("awq", {"zero_point": False}, "zero_point must be True, got False"),
    ("int4", {"format": "marlin-24"}, "format must be one of .*'marlin-24'"),
    ("int4", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme must be None"),
    ("int4", {"config_groups": {}}, "config_groups must be an object of groups"),
]


@pytest.mark.parametrize(("name", "changes", "reason"), REFUSED)
def test_what_is_not_read_is_refused_by_name(
    name: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    make_int(name, tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"quantization_config.*{reason}|: .*{reason}"):
        load(tmp_path)


@pytest.mark.parametrize("group", [None, 5, {"weights": ["num_bits"]}])
def test_groups_of_compressed_tensors_that_are_none(group: Any, tmp_path: Path) -> None:
    make_int("int4", tmp_path, config_groups={"group_0": group})
    with pytest.raises(ValueError, match="config_groups must be an object of groups with weights"):
        load(tmp_path)


def test_zero_points_of_another_shape_are_named(tmp_path: Path) -> None:
    make_int("int4", tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_zero_point"
    zeros = torch.zeros(whole[name.replace("zero_point", "scale")].shape[0], 1, dtype=torch.int8)
    save_file({**whole, name: zeros}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"weight_zero_point has shape .*, the others ask for"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("inside", "value", "reason"),
    [
        ("input_activations", {"num_bits": 8}, r"group_0: input_activations must be None, got .*8"),
        ("weights", {"num_bits": 8, "type": "float"}, "group_0.weights: type must be 'int'"),
        ("weights", {"num_bits": 4, "actorder": "group"}, "weights: actorder must be .*'group'"),
        ("weights", {"num_bits": 2}, "weights: num_bits must be 4 or 8, got 2"),
        ("weights", {"num_bits": 4, "dynamic": True}, "weights: dynamic must be .*, got True"),
        ("weights", {"num_bits": 4, "symmetric": 0}, "weights: symmetric must be true or false"),
        ("weights", {"num_bits": 4, "group_size": 64}, "5 groups, but group_size says .* 64"),
        (
            "weights",
            {"num_bits": 4, "strategy": "channel", "group_size": 32},
            "weights: group_size must be None or -1, as strategy is 'channel', got 32",
        ),
        ("weights", {"num_bits": 4, "strategy": "group"}, "weights: group_size must be an integer"),
        (
            "weights",
            {"num_bits": 4, "group_size": 32, "symmetric": False},
            "has weight_packed, but no weight_zero_point",
        ),
        ("weights", {"num_bits": 4, "strategy": "block"}, "weights: strategy must be .*'block'"),
    ],
)
def test_groups_of_compressed_tensors_that_are_not_read(
    inside: str, value: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    config = FORMATS["int4"][0]
    groups = {"group_0": {**config["config_groups"]["group_0"], inside: value}}
    make_int("int4", tmp_path, config_groups=groups)
    with pytest.raises(ValueError, match=reason):
        load(tmp_path)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    make_int("gptq-4", tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    matrix = "model.layers.1.mlp.up_proj"
    order = torch.arange(96, dtype=torch.int32).flip(0) // 32
    for part, tensor, reason in (
        ("g_idx", order, r"up_proj\.g_idx must be in ascending order.*act-order"),
        ("qzeros", None, "up_proj has qweight, but no qzeros"),
        ("qzeros", torch.zeros(3, 19, dtype=torch.int32), r"up_proj\.qzeros has shape \[3, 19\]"),
        ("qzeros", torch.zeros(3, 18), r"up_proj\.qzeros must be in I32, got F32"),
        ("scales", torch.zeros(()), r"up_proj\.scales must be a matrix, got shape \[\]"),
    ):
        tensors = {**whole, f"{matrix}.{part}": tensor}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=reason):
            load(tmp_path)


@pytest.mark.parametrize("weights", ["auto", "none"])
@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize(
    ("name", "part"),
    [("gptq-4", "scales"), ("awq", "scales"), ("int4", "weight_scale"), ("int8", "weight_scale")],
)
def test_scales_that_are_no_numbers_are_refused(
    name: str, part: str, wrong: float, weights: str, tmp_path: Path
) -> None:
    make_int(name, tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    scales = whole[f"model.layers.1.mlp.up_proj.{part}"]
    scales[-1, -1] = wrong
    save_file(whole, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"1\.mlp\.up_proj\.{part} must be finite, got {wrong:g}"):
        load(tmp_path, weights=weights)


@pytest.mark.parametrize("stated", [[160, 95], [96, 160], [160], [[160, 96, 1]]])
def test_a_stated_shape_that_is_not_that_of_the_codes_is_refused(
    stated: list[Any], tmp_path: Path
) -> None:
    make_int("int4", tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    whole["model.layers.1.mlp.up_proj.weight_shape"] = torch.tensor(stated)
    save_file(whole, tmp_path / "model.safetensors")
    asked = r"weight_packed has \[160, 96\]"
    with pytest.raises(ValueError, match=rf"1\.mlp\.up_proj\.weight_shape says .*, {asked}"):
        load(tmp_path)


@pytest.mark.parametrize("key", ["format", "checkpoint_format"])
def test_either_name_of_gptqs_format_is_read(key: str, tmp_path: Path) -> None:
    oracle = make_int("gptq-v2", tmp_path, **{"checkpoint_format": None, key: "gptq_v2"})
    compare_fp32(oracle, load(tmp_path))


def test_a_bias_that_a_family_lacks_adds_nothing_or_is_refused(tmp_path: Path) -> None:
    oracle = make_int("gptq-4", tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.bias"
    for bias in (
        torch.zeros(160).half(),
        torch.zeros(160).half().index_fill(0, torch.tensor(7), 1),
    ):
        save_file({**whole, name: bias}, tmp_path / "model.safetensors")
        if not bias.any():
            compare_fp32(oracle, load(tmp_path))
            continue
        with pytest.raises(ValueError, match=rf"unknown weights for Qwen3.*: {name}"):
            load(tmp_path)


def test_a_config_that_is_no_object(tmp_path: Path) -> None:
    make_int("gptq-4", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": "gptq"}))
    with pytest.raises(ValueError, match="quantization_config must be an object, got 'gptq'"):
        load(tmp_path)
