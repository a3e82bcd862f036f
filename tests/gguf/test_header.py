"""Headers of GGUF files: every type is read as the gguf package has it, what is wrong is named."""

import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from minisgl.gguf.header import TYPES, read_gguf
from minisgl.gguf.weights import GgufWeights
from minisgl.layers.weights import Placement
from minisgl.models.config import ModelConfig
from minisgl.models.loader import load_model
from tests.world.gguf_files import make_gguf, write_tensors_only


def blocks(kind: Type, rows: int, count: int, seed: int = 0) -> np.ndarray:
    """Rows of so many random blocks. Their scales, which are fp16, are small."""
    size = GGML_QUANT_SIZES[kind][1]
    found = np.random.default_rng(seed).integers(0, 256, (rows, count, size), np.uint8)
    if kind in (Type.F32, Type.F16, Type.BF16):
        numbers = np.random.default_rng(seed).normal(size=(rows, count)).astype(np.float32)
        return gguf.quantize(numbers, kind).view(np.uint8).reshape(rows, -1)
    at = size - 2 if kind == Type.Q6_K else 0
    wide = 4 if kind in (Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K) else 2
    found[..., at + 1 : at + wide : 2] &= 0x1F
    return found.reshape(rows, -1)


@pytest.mark.parametrize("name", TYPES)
def test_any_part_of_every_type_is_bit_for_bit_what_the_package_makes(name: str, tmp_path) -> None:
    kind = Type[name]
    tensors = {"x": (blocks(kind, 37, 5), kind), "y": (blocks(kind, 1, 3, 1), kind)}
    write_tensors_only(tmp_path / "m.gguf", tensors)
    weights = GgufWeights(read_gguf(tmp_path / "m.gguf"), None, gemma=False)
    for tensor, (stored, _) in tensors.items():
        whole, part = gguf.dequantize(stored, kind), weights.get_slice(tensor)
        assert part.get_shape() == whole.shape
        assert np.isfinite(whole).all()
        for rows in (slice(None), slice(7, 30), slice(36, 37))[: len(whole)]:
            for columns in (slice(None), slice(1, 5), slice(0, 3)):
                found = part[(rows, columns)]
                np.testing.assert_array_equal(found, whole[rows, columns], strict=True)
                assert found.dtype == np.float32


def test_other_types_are_refused_by_name_and_type(tmp_path: Path) -> None:
    size = GGML_QUANT_SIZES[Type.Q3_K][1]
    tensors = {"blk.0.attn_q.weight": (np.zeros((4, size), np.uint8), Type.Q3_K)}
    write_tensors_only(tmp_path / "m.gguf", tensors)
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q\.weight has the type Q3_K; read are F32"):
        read_gguf(tmp_path / "m.gguf")


def header(*parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HUGE = 2**63
WRONG = {
    "is no GGUF file": b"GGML" + bytes(40),
    "the magic number takes 4 bytes, but the file of a header ends after 2": b"GG",
    r"the version must be one of \(2, 3\), little-endian, got 50331648": header(version=3 << 24),
    "number of tensors is 9223372036854775808, but": header(tensors=HUGE),
    "number of keys is 9223372036854775808, but": header(keys=HUGE),
    "name of key 0 must have at most 1024 bytes, got 9223": header(struct.pack("<Q", HUGE), keys=1),
    "name of key 0 is no UTF-8": header(text(b"\xff"), keys=1),
    "key a is there twice": header(key(b"a", 0, b"1"), key(b"a", 0, b"1"), keys=2),
    "a has the unknown type 13": header(key(b"a", 13, b"1"), keys=1),
    "a must be 0 or 1 as a boolean, got 7": header(key(b"a", 7, b"\x07"), keys=1),
    "a must be finite, got nan": header(key(b"a", 6, struct.pack("<f", float("nan"))), keys=1),
    "a must have at most": header(key(b"a", 8, struct.pack("<Q", HUGE)), keys=1),
    "a takes 40 bytes, but the file of a header ends after 10": header(
        key(b"a", 9, struct.pack("<IQ", 4, 10) + bytes(10)), keys=1
    ),
    "a is an array of the type 9, which is not read": header(
        key(b"a", 9, struct.pack("<IQ", 9, 1) + bytes(16)), keys=1
    ),
    "general.alignment must be a multiple of 8 of at most 65536, got 7": header(
        key(b"general.alignment", 4, struct.pack("<I", 7)), keys=1
    ),
    r"split.count must be 0 or 1, got 3; merge the parts": header(
        key(b"split.count", 2, struct.pack("<H", 3)), keys=1
    ),
    r"split.count must be 0 or 1, got \[1\]; merge": header(
        key(b"split.count", 9, struct.pack("<IQi", 5, 1, 1)), keys=1
    ),
    r"split.count must be 0 or 1, got \[1, 2\]; merge": header(
        key(b"split.count", 9, struct.pack("<IQii", 5, 2, 1, 2)), keys=1
    ),
    "tensor t must have 1 to 4 dimensions, got 9": header(tensor(b"t", [1] * 9), tensors=1),
    "tensor t has the type number 77": header(tensor(b"t", [4], 77), tensors=1),
    r"tensor t must have sizes above 0, the last a multiple of 32 \(Q8_0\), got \(2, 33\)": header(
        tensor(b"t", [33, 2], 8), bytes(4096), tensors=1
    ),
    "tensor t takes bytes 96 to 36893488147419103328": header(
        tensor(b"t", [2**31, 2**32]), bytes(64), tensors=1
    ),
    "tensor u takes bytes 96 to 112, after others that end at 112": header(
        tensor(b"t", [4]), tensor(b"u", [4]), bytes(64), tensors=2
    ),
    "tensor t is there twice": header(
        tensor(b"t", [8]), tensor(b"t", [8], 0, 32), bytes(96), tensors=2
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_named(message: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(WRONG[message])
    with pytest.raises(ValueError, match=message) as found:
        read_gguf(path)
    assert str(found.value).startswith(str(path))


def test_a_file_merged_from_parts_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header(key(b"split.count", 2, struct.pack("<H", 0)), keys=1))
    assert read_gguf(path).metadata == {"split.count": 0}


def test_what_a_model_needs_and_does_not_have_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make_gguf("llama2", path)
    whole = path.read_bytes()
    at = Placement(torch.float32, torch.device("cpu"))

    def told(old: bytes, new: bytes, message: str) -> None:
        assert whole.count(old) >= 1
        assert len(old) == len(new)
        path.write_bytes(whole.replace(old, new, 1))
        with pytest.raises(ValueError, match=message):
            load_model(ModelConfig.from_hf(path), path, at)

    def number(name: str, value: int) -> bytes:
        return name.encode() + struct.pack("<II", 4, value)

    told(b"blk.1.attn_k.weight", b"blk.1.attn_x.weight", "unknown weights .* blk.1.attn_x.weight")
    told(
        b"\x05\x00\x00\x00\x00\x00\x00\x00llama",
        b"\x05\x00\x00\x00\x00\x00\x00\x00lamma",
        "one of llama, qwen2",
    )
    size, layers, context = "llama.embedding_length", "llama.block_count", "llama.context_length"
    told(number(size, 96), number(size, 98), "has shape .*, the config asks for")
    told(number(layers, 3), number(layers, 2**31), "block_count must be an integer of 0 to 1024")
    told(number(context, 256), number(context, 2**30), "context_length must be an integer of 0 to")
    told(
        number(layers, 3), number(layers, 2), "unknown weights for LlamaForCausalLM: blk.2|layers.2"
    )


def fuzzed(tmp_path: Path, seconds: float, seed: int) -> None:
    files = []
    for name in ("llama2", "qwen3-moe", "gemma2"):
        path = tmp_path / name / "model.gguf"
        path.parent.mkdir()
        make_gguf(name, path, Type.F32 if name == "gemma2" else Type.Q8_0, vocab_size=400)
        files.append(str(path))
    command = [sys.executable, "-m", "tests.gguf.fuzz", str(seconds), str(seed), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120 + 3 * seconds)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr[-3000:]
    assert int(done.stdout.split()[-4]) > 10


def test_changed_files_are_read_or_refused(tmp_path: Path) -> None:
    fuzzed(tmp_path, 4, 0)


@pytest.mark.thorough
def test_a_minute_of_changed_files(tmp_path: Path) -> None:
    fuzzed(tmp_path, 60, 10**6)
