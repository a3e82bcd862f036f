"""Weights of 4 and 8 bits: what rounding to them loses, and what is computed with them."""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from minisgl import csrc
from minisgl.kernels.embedding import embedding
from minisgl.kernels.grouped_linear import panels
from minisgl.kernels.grouped_linear.weights import Grouped, quantized, quantized_reference
from minisgl.kernels.matrix import packed, product, tensors, unpacked
from minisgl.layers.weights import Block
from tests.models.driver import Paged
from tests.world.tiny import tiny_decoder


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_each_weight_is_the_nearest_code(bits: int, group: int) -> None:
    weight = torch.randn(3, 256, generator=torch.Generator().manual_seed(bits)).bfloat16()
    found = quantized(weight, bits, group)
    assert found.shape == weight.shape
    assert found.group == group
    assert found.codes.max() <= 2**bits - 1
    step = found.scales.repeat_interleave(group, -1)
    error = (found.dequantized() - weight.float()).abs()
    inside = (found.codes > 0) & (found.codes < 2**bits - 1)  # others may be cut off
    assert (error <= step * 0.5001)[inside].all()
    assert torch.equal(found.scales, found.scales.half().float())
    low, high = weight.float().unflatten(-1, (-1, group)).aminmax(dim=-1)
    if bits == 8:  # whose range has zero in its middle
        high = low.abs().maximum(high)
        low = -high
    plain = ((high - low) / (2**bits - 1)).square() / 12  # of codes over the whole range
    assert error.square().mean() < 1.05 * plain.mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "group"), [(1, 32), (3001, 32), (257, 64), (100, 96), (9, 4096)])
def test_native_rounding_is_the_reference_to_the_bit(
    rows: int, group: int, bits: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows + bits)
    weight = torch.randn(rows, 2 * group, generator=generator)
    weight[::2] *= torch.rand(len(weight[::2]), 1, generator=generator) * 1e-6  # fp16's subnormals
    weight[::7] = weight[::7].abs()
    weight[::5, :group] = 0.0
    weight[-1, -1] = 60000.0
    weight = weight.to(dtype)
    codes, scales, minimums = quantized_reference(weight.view(-1, group), bits)
    found = quantized(weight, bits, group)
    assert torch.equal(found.codes, codes.to(torch.uint8).view(rows, -1))
    assert torch.equal(found.scales, scales.view(rows, 2))
    assert torch.equal(found.minimums, minimums.view(rows, 2))


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_without_native_ops_is_the_same(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(2**7, 2**9, generator=torch.Generator().manual_seed(2))
    native = quantized(weight.T, bits, 64)
    monkeypatch.setattr(csrc, "load", lambda *_, **__: None)
    plain = quantized(weight.T, bits, 64)
    for one, other in zip(native.tensors, plain.tensors, strict=True):
        assert torch.equal(one, other)
    assert plain.shape == (512, 128)


def test_what_codes_can_say_is_kept() -> None:
    codes = torch.randint(0, 16, (5, 64), dtype=torch.uint8)
    codes[:, ::32], codes[:, 1::32] = 0, 15
    exact = Grouped(codes, torch.full((5, 2), 0.5), torch.full((5, 2), -4.0))
    found = quantized(exact.dequantized(), 4, 32)
    torch.testing.assert_close(found.dequantized(), exact.dequantized(), rtol=0, atol=0)


def test_views_are_filled_and_larger_groups_divided() -> None:
    whole = quantized(torch.randn(6, 128), 8, 32)
    part = quantized(torch.randn(2, 128), 4, 128)
    whole[2:4].fill(part)
    assert torch.equal(whole.dequantized()[2:4], part.dequantized())


@pytest.mark.parametrize(("k", "groups", "said"), [(96, 2, "K 96 and .* 48"), (40, 1, "K 40")])
def test_groups_that_are_not_of_whole_blocks_are_refused(k: int, groups: int, said: str) -> None:
    codes = torch.zeros(2, k, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"multiple of the group, .* got {said}"):
        Grouped(codes, torch.ones(2, groups), torch.ones(2, groups))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", [(2 * 64 * 32, 64), (64 * 32 + 5, 32), (3, 32), (2, 66, 96)])
@pytest.mark.parametrize("in_place", [False, True])
def test_codes_are_packed_piece_by_piece_without_loss(
    bits: int, shape: tuple[int, ...], in_place: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(panels, "LARGE", 0 if in_place else 2**26)
    generator = torch.Generator().manual_seed(1)
    weight = quantized(torch.randn(shape, generator=generator), bits, 32)
    codes, dense = weight.codes.clone(), weight.dequantized()
    made = packed(weight)
    assert made.bits == bits
    assert torch.equal(made.unpacked().codes, codes)
    assert torch.equal(unpacked(made), dense)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 192])
@pytest.mark.parametrize("rows", [1, 3, 7, 65, 200])
def test_products_round_inputs_to_8_bits_where_the_weight_says_so(
    bits: int, group: int, rows: int
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 192, generator=generator)
    x[0, :32] = 0.0
    weight = quantized(torch.randn(37, 192, generator=generator), bits, group)
    blocks = x.view(rows, 6, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * (127 / largest.clamp(min=1e-30))).round()  # in fp32: some are close to ties
    rounded = codes.double() * largest.double() / 127
    whole = weight.codes.double().view(37, -1, group)
    matrix = whole * weight.scales.double()[..., None] + weight.minimums.double()[..., None]
    for inputs, activations in ((x.double(), "float"), (rounded.view(rows, 192), "int8")):
        expected = inputs @ matrix.view(37, 192).T
        own = packed(replace(weight, activations=activations))
        torch.testing.assert_close(product(x, own).double(), expected, rtol=2e-5, atol=2e-4)


def test_rows_of_quantised_weights() -> None:
    weight = replace(quantized(torch.randn(37, 64), 4, 32), dtype=torch.bfloat16)
    table, dense = packed(weight), weight.dequantized(torch.bfloat16)
    ids = torch.tensor([36, 0, 5, 5], dtype=torch.int32)
    assert torch.equal(embedding(ids, table), dense[ids])
    assert torch.equal(unpacked(table), dense)
    for outside in (37, -1):
        with pytest.raises(IndexError):
            embedding(torch.tensor([outside]), table)


def _all_blocks(block: Block) -> Iterator[Block]:
    yield block
    for part in block.blocks():
        yield from _all_blocks(part)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_computes_what_its_codes_say(bits: int) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 96}
    dense, coded = (tiny_decoder(seed=3, **shape) for _ in range(2))
    held = dense.weight_bytes
    saved = 0
    for one, other in zip(_all_blocks(dense), _all_blocks(coded), strict=True):
        weight = getattr(one, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2:
            grouped = quantized(weight, bits, 32)
            saved += weight.nbytes - sum(tensor.nbytes for tensor in tensors(grouped))
            vars(one)["weight"], vars(other)["weight"] = grouped.dequantized(), grouped
    coded.pack()
    assert dense.weight_bytes == held
    assert 0 < saved <= held - coded.weight_bytes
    prompt = {0: [5, 9, 2, 33, 60, 7], 1: [4]}
    found, expected = (Paged(model, 2, 16).prefill(prompt, 4) for model in (coded, dense))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "value"),
    [(8, 1e8), (4, 1e6), (4, -1e6), *((b, float(v)) for b in (4, 8) for v in ("nan", "-inf"))],
)
def test_weights_that_no_scale_holds_are_refused(bits: int, value: float) -> None:
    weight = torch.ones(2, 64)
    weight[1, 3] = value
    with pytest.raises(ValueError, match="within fp16's range"):
        quantized(weight, bits, 32)


def test_nor_are_those_that_a_smaller_range_would_hold() -> None:
    weight = torch.full((1, 32), 540_000.0)
    weight[0, 0] = 1e6  # 15 steps of 66,667, which fp16 does not have, and of 60,000, which it has
    for given in (weight, weight.bfloat16()):
        with pytest.raises(ValueError, match="within fp16's range"):
            quantized(given, 4, 32)


@pytest.mark.parametrize(("k", "group"), [(24, 24), (48, 32)])
def test_groups_of_parts_of_blocks_are_refused_before_anything_is_read(k: int, group: int) -> None:
    with pytest.raises(ValueError, match=f"got {k}, {group}"):
        quantized(torch.ones(2, k), 4, group)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_inputs_that_are_no_numbers_stay_so(bits: int, value: float) -> None:
    weight = replace(quantized(torch.randn(37, 64), bits, 32), activations="int8")
    x = torch.randn(3, 64)
    x[1, 40] = value
    found = product(x, packed(weight))
    assert found[1].isnan().all()
    assert found[0].isfinite().all()
    assert found[2].isfinite().all()
