"""Tiny checkpoints in the formats of GPTQ, AWQ and compressed-tensors, packed by their rules.

Each is written code by code from the packing as it is published, so that nothing of how it is read
is assumed: AutoGPTQ's `QuantLinear.pack`, AutoAWQ's `WQLinear_GEMM.from_linear` and
compressed-tensors' `pack_to_int32`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.world.checkpoints import CHECKPOINTS, make

SIZES = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 16, "num_hidden_layers": 2}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column that each place of a word holds
Packed = dict[str, torch.Tensor]
Codes = tuple[np.ndarray, np.ndarray, np.ndarray]  # codes [N, K], zeros and scales [N, K / G]


def words(codes: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Codes [R, C] packed along C; the last word may not be full."""
    per_word = 32 // bits
    packed = np.zeros((len(codes), -(-codes.shape[1] // per_word)), np.uint32)
    for column in range(codes.shape[1]):
        place = column % per_word
        place = place if order is None else order.index(place)
        packed[:, column // per_word] |= codes[:, column].astype(np.uint32) << bits * place
    return torch.from_numpy(packed.view(np.int32))


def gptq(bits: int, version: int = 1) -> Callable[[Codes], Packed]:
    def pack(found: Codes) -> Packed:
        codes, zeros, scales = found
        stored = zeros - 1 if version == 1 else zeros
        size = codes.shape[1] // zeros.shape[1]
        return {
            "qweight": words(codes, bits).T.contiguous(),
            "qzeros": words(stored.T, bits),
            "scales": torch.from_numpy(scales.T.copy()),
            "g_idx": torch.tensor([i // size for i in range(codes.shape[1])], dtype=torch.int32),
        }

    return pack


def awq(found: Codes) -> Packed:
    codes, zeros, scales = found
    return {
        "qweight": words(codes.T, 4, AWQ_ORDER),
        "qzeros": words(zeros.T, 4, AWQ_ORDER),
        "scales": torch.from_numpy(scales.T.copy()),
    }


def compressed(bits: int, symmetric: bool) -> Callable[[Codes], Packed]:
    def pack(found: Codes) -> Packed:
        codes, zeros, scales = found
        tensors = {
            "weight_packed": words(codes, bits),
            "weight_scale": torch.from_numpy(scales).bfloat16(),
            "weight_shape": torch.tensor(codes.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = words(zeros.T, bits).T.contiguous()
        return tensors

    return pack


def int8(found: Codes) -> Packed:
    codes, _, scales = found
    signed = torch.from_numpy((codes.astype(np.int32) - 128).astype(np.int8))
    return {"weight": signed, "weight_scale": torch.from_numpy(scales).bfloat16()}


def _gptq_config(bits: int, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, **more}


def _compressed_config(bits: int, symmetric: bool, kind: str, **weights: Any) -> dict[str, Any]:
    how = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group"}
    group = {"targets": ["Linear"], "weights": {**how, "group_size": 32, **weights}}
    group |= {"input_activations": None, "output_activations": None}
    config = {
        "quant_method": "compressed-tensors",
        "format": kind,
        "config_groups": {"group_0": group},
    }
    return {**config, "ignore": ["lm_head"], "quantization_status": "compressed"}


# Name -> quantization_config, how it is packed, bits, inputs of a group (0: all), and whether
# zeros are in the middle of the range.
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
FORMATS: dict[str, tuple[dict[str, Any], Callable[[Codes], Packed], int, int, bool]] = {
    "gptq-4": (_gptq_config(4), gptq(4), 4, 32, False),
    "gptq-8": (_gptq_config(8, group_size=-1), gptq(8), 8, 0, False),
    "gptq-v2": (_gptq_config(4, checkpoint_format="gptq_v2"), gptq(4, 2), 4, 32, False),
    "awq": (AWQ, awq, 4, 32, False),
    "int4": (_compressed_config(4, True, "pack-quantized"), compressed(4, True), 4, 32, True),
    "int4-zeros": (
        _compressed_config(4, False, "pack-quantized"),
        compressed(4, False),
        4,
        32,
        False,
    ),
    "int8-packed": (
        _compressed_config(8, True, "pack-quantized"),
        compressed(8, True),
        8,
        32,
        True,
    ),
    "int8": (
        _compressed_config(8, True, "int-quantized", strategy="channel", group_size=None),
        int8,
        8,
        0,
        True,
    ),
}


def make_int(name: str, folder: Path, **changes: Any) -> transformers.PreTrainedModel:
    """The transformers model of a format, with the weights that its checkpoint in `folder` stands
    for. `changes` are those of quantization_config."""
    config, pack, bits, size, middle = FORMATS[name]
    CHECKPOINTS["int"] = "Qwen3", {**SIZES, "attention_bias": True}
    try:
        model = make("int", folder)
    finally:
        del CHECKPOINTS["int"]
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(5)
    for matrix, parameter in model.named_parameters():
        if not matrix.endswith("_proj.weight"):
            continue
        n, k = parameter.shape
        groups = k // (size or k)
        codes = rng.integers(0, 2**bits, (n, k))
        zeros = rng.integers(1, 2**bits, (n, groups))
        zeros = np.full_like(zeros, 2 ** (bits - 1)) if middle else zeros
        scales = rng.uniform(0.5, 1.5, (n, groups)) * k**-0.5 / 2 ** (bits - 1)
        scales = torch.from_numpy(scales).bfloat16().float().numpy().astype(np.float16)
        whole = scales.astype(np.float64).repeat(k // groups, 1)
        weights = (codes - zeros.repeat(k // groups, 1)) * whole
        parameter.data.copy_(torch.from_numpy(weights))
        del tensors[matrix]
        for part, tensor in pack((codes, zeros, scales)).items():
            tensors[f"{matrix.removesuffix('weight')}{part}"] = tensor
    save_file(tensors, folder / "model.safetensors")
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {**config, **changes}
    (folder / "config.json").write_text(json.dumps(described))
    return model
