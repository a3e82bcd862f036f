"""Native products with weights of 4 and 8 bits: every form that packing chooses, every level.

The reference rounds activations by itself where the weight says so, so that what is allowed beside
the sums' own error in fp32 is nothing.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch

from minisgl import csrc
from minisgl.kernels.embedding import embedding
from minisgl.kernels.grouped_linear import grouped_linear
from minisgl.kernels.grouped_linear.panels import GroupedPanels
from minisgl.kernels.grouped_linear.weights import Grouped
from minisgl.kernels.matrix import packed
from tests.kernels.cards import check
from tests.world.codes import random_codes
from tests.world.levels import at, levels

NATIVE = csrc.load("model_ops", wait=True)
pytestmark = pytest.mark.skipif(NATIVE is None, reason="no compiler: nothing is packed")


def _weight(n: int, k: int, bits: int, group: int, minimums: str, dtype: torch.dtype) -> Grouped:
    """In bf16 its inputs are rounded."""
    activations: Any = "int8" if dtype == torch.bfloat16 else "float"
    return replace(random_codes(n, k, bits, group, minimums, dtype), activations=activations)


@pytest.mark.parametrize("level", [*levels(), None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("minimums", ["implied", "fp16", "fp32"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("rows", "n", "k", "group"),
    [(1, 96, 64, 32), (3, 131, 256, 64), (7, 33, 384, 128), (65, 257, 96, 32), (200, 5, 96, 96)],
)
def test_products_and_rows(
    rows: int, n: int, k: int, group: int, bits: int, minimums: str, dtype: torch.dtype,
    level: str | None,
) -> None:  # fmt: skip
    weight = _weight(n, k, bits, group, minimums, dtype)
    panels = packed(weight)
    assert isinstance(panels, GroupedPanels)
    assert panels.bits == bits
    assert (panels.minimums is None) == (minimums == "implied")
    assert (panels.scales.dtype == torch.float32) == (minimums == "fp32")
    for own, found in zip(weight.tensors, panels.unpacked().tensors, strict=True):
        assert torch.equal(own, found)
    x = torch.randn(rows, k, generator=torch.Generator().manual_seed(rows)).to(dtype)
    x[0, :32] = 0.0
    bias = torch.randn(n).to(dtype) if n % 2 else None
    ids = torch.tensor([0, n - 1, n // 2], dtype=torch.int32)
    with at(level):
        for wide in (False, True):
            check(grouped_linear, "cpu", {"x": x, "weight": panels, "bias": bias, "wide": wide})
        expected = weight.dequantized(dtype)[ids]
        torch.testing.assert_close(embedding(ids, panels), expected, rtol=2**-7, atol=1e-7)
        given = torch.cat((ids + 8, ids[:1] + 7))  # the last one is before the part
        found = embedding(given, panels, (8, n), 0.5)
        torch.testing.assert_close(found[:-1], expected * 0.5, rtol=2**-7, atol=1e-7)
        assert not found[-1].any()
        with pytest.raises(IndexError):
            embedding(torch.tensor([n]), panels)


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_has_one_result_in_any_batch(bits: int, activations: Any, level: str) -> None:
    weight = _weight(301, 512, bits, 64, "fp16", torch.bfloat16)
    panels = packed(replace(weight, activations=activations))
    x = torch.randn(350, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    with at(level):
        whole = grouped_linear(x, panels)
        for start, end in ((0, 1), (3, 5), (5, 8), (7, 23), (100, 349)):
            assert torch.equal(grouped_linear(x[start:end], panels), whole[start:end])


@pytest.mark.parametrize("level", [*levels(), None])
def test_what_is_no_number_stays_none_and_the_smallest_are_zero(level: str | None) -> None:
    panels = packed(_weight(40, 64, 4, 32, "fp16", torch.bfloat16))
    x = torch.randn(9, 64).bfloat16()
    x[2, 5], x[4, 40], x[6, 32:] = torch.nan, torch.inf, 2.0**-130
    zeros = x.clone()
    zeros[6, 32:] = 0.0
    with at(level):
        found, others = grouped_linear(x, panels), grouped_linear(zeros, panels)
    assert found.isfinite().all(-1).tolist() == [row not in (2, 4) for row in range(9)]
    assert found[2].isnan().all()
    torch.testing.assert_close(found[6], others[6], rtol=0, atol=0)


def test_a_group_that_does_not_fit_is_refused() -> None:
    numbers = torch.ones(4, 3)
    with pytest.raises(ValueError, match="got K 48 and a group of 16"):
        Grouped(torch.zeros(4, 48, dtype=torch.uint8), numbers, numbers)
