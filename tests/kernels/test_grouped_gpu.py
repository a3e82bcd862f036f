"""Products with weights of 4 and 8 bits by a GPU's kernels: every form that packing chooses."""

from dataclasses import replace

import pytest
import torch

from minisgl.kernels.config import fixed_order, target
from minisgl.kernels.embedding import embedding
from minisgl.kernels.grouped_linear import grouped_linear
from minisgl.kernels.grouped_linear.blocks import packed
from minisgl.kernels.grouped_linear.portable import grouped_linear_portable, part_count
from minisgl.kernels.grouped_linear.weights import Grouped
from minisgl.kernels.matrix import unpacked
from minisgl.kernels.moe import moe_experts
from minisgl.kernels.moe.portable import moe_experts_portable
from tests.kernels.cards import check
from tests.world.codes import random_codes


@pytest.fixture(autouse=True)
def _on_hopper():
    with target(90):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("minimums", ["implied", "fp16", "fp32"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "n", "k", "group"),
    [(1, 96, 64, 32), (3, 131, 544, 32), (7, 33, 384, 128), (70, 130, 96, 96), (150, 5, 64, 64)],
)
def test_products_and_rows(
    rows: int, n: int, k: int, group: int, bits: int, minimums: str, dtype: torch.dtype
) -> None:
    weight = random_codes(n, k, bits, group, minimums, dtype)
    blocks = packed(weight)
    assert blocks.bits == bits
    assert (blocks.minimums is None) == (minimums == "implied")
    assert (blocks.scales.dtype == torch.float32) == (minimums == "fp32")
    for own, found in zip(weight.tensors, blocks.unpacked().tensors, strict=True):
        assert torch.equal(own, found)
    assert torch.equal(unpacked(blocks), weight.dequantized(dtype))
    ids = torch.tensor([0, n - 1, n // 2], dtype=torch.int32)
    assert torch.equal(embedding(ids, blocks), weight.dequantized(dtype)[ids])
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)
    bias = torch.randn(n).to(dtype) if n % 2 else None
    for wide in (False, True):
        arguments = {"x": x, "weight": blocks, "bias": bias, "wide": wide}
        check(grouped_linear, "portable", arguments)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_has_one_result_in_any_batch_in_a_fixed_order(bits: int) -> None:
    blocks = packed(random_codes(70, 1056, bits, 32, "fp16", torch.bfloat16))
    x = torch.randn(140, 1056, generator=torch.Generator().manual_seed(0)).bfloat16()
    with fixed_order():
        whole = grouped_linear_portable(x, blocks)
        for start, end in ((0, 1), (139, 140), (30, 100)):
            assert torch.equal(grouped_linear_portable(x[start:end], blocks), whole[start:end])


def test_rows_need_not_be_dense_and_what_does_not_fit_is_refused() -> None:
    blocks = packed(random_codes(40, 64, 8, 32, "fp16", torch.float32))
    x = torch.randn(6, 64)
    wider = torch.cat([x, torch.full_like(x, torch.nan)], dim=1)
    found = grouped_linear_portable(wider[:, :64], blocks)
    assert torch.equal(found, grouped_linear_portable(x, blocks))
    for shape in ((6, 32), (6, 96)):
        with pytest.raises(ValueError, match=r"x must be \[..., 64\]"):
            grouped_linear_portable(torch.ones(shape), blocks)
    with pytest.raises(ValueError, match="bias"):
        grouped_linear_portable(x, blocks, torch.ones(2))
    with pytest.raises(ValueError, match="activations must be float"):
        packed(replace(blocks.unpacked(), activations="int8"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("minimums", ["implied", "fp16", "fp32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_experts(bits: int, minimums: str, dtype: torch.dtype) -> None:
    """Of three experts, one of which has no token; inputs that are no whole blocks of 4 bits."""
    experts, hidden, inner = 3, 96, 32

    def matrix(rows: int, inputs: int, group: int) -> Grouped:
        weight = random_codes(experts * rows, inputs, bits, group, minimums, dtype)
        return weight.reshaped(experts, rows)

    coded = matrix(2 * inner, hidden, 96), matrix(hidden, inner, 32)
    blocks = [packed(each) for each in coded]
    for weight, held in zip(coded, blocks, strict=True):
        assert (held.bits, held.minimums is None) == (bits, minimums == "implied")
        for own, found in zip(weight.tensors, held.unpacked().tensors, strict=True):
            assert torch.equal(own, found)
        assert torch.equal(unpacked(held[1]), weight[1].dequantized(dtype))
    generator = torch.Generator().manual_seed(bits)
    ids = torch.tensor([[0, 2], [2, 0], [2, -1], [0, 2], [2, 0]], dtype=torch.int32)
    arguments = {"x": torch.randn(5, hidden, generator=generator).to(dtype)}
    arguments |= {"gate_up": blocks[0], "down": blocks[1], "ids": ids}
    arguments |= {"weights": torch.rand(ids.shape, generator=generator)}
    check(moe_experts, "portable", arguments)
    with pytest.raises(ValueError, match=r"gate_up must be \[3, 64, 96\]"):
        moe_experts_portable(**arguments | {"gate_up": blocks[1]})


def test_part_counts_depend_on_shapes_alone() -> None:
    assert part_count(8, 132, 64, 1) == 16
    assert part_count(2000, 132, 64, 1) == 1
    assert part_count(300, 132, 64, 1) == 2
    assert part_count(8, 132, 9, 1) == 2  # of four blocks at least
    assert part_count(8, 132, 1, 1) == 1
    assert part_count(8, 132, 64, 64) == 4  # the parts of more rows are larger
    assert part_count(8, 132, 64, 300) == 1
