"""Weights of 4 and 8 bits: what rounding to them loses, and that it is the least that it can be."""

import pytest
import torch

from minisgl.kernels.grouped_linear.weights import Grouped, quantized


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
