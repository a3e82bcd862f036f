"""Random weights of 4 and 8 bits in every form that packing tells apart."""

import torch

from minisgl.kernels.grouped_linear.weights import Grouped


def random_codes(
    n: int, k: int, bits: int, group: int, minimums: str, dtype: torch.dtype
) -> Grouped:
    """minimums: "implied" by scales; or of their own, in "fp16" or "fp32" as scales are."""
    generator = torch.Generator().manual_seed(n + k)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator, dtype=torch.uint8)
    codes[0, 0] = 2**bits - 1
    scales = torch.rand(n, k // group, generator=generator) / k
    scales = scales if minimums == "fp32" else scales.half().float()
    least = -(2.0 ** (bits - 1)) * scales
    if minimums != "implied":
        least = (least * 1.25).half().float()
    return Grouped(codes, scales, least, dtype)
