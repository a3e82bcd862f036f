"""RMSNorm, alone or with the residual addition before it.

    s = x + residual                              (rounded to x's dtype: the new residual)
    y = s / sqrt(mean(s^2, last dim) + eps) * w   (fp32, rounded once; w is 1 + weight in Gemma)

Normalises the last dimension: hidden states [T, H], and queries and keys per head [T, heads, D].
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019.
"""

from typing import Any

import torch

from minisgl.kernels.op import WIDE, Case, Cost, Expected, Implementation, Op


def rmsnorm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    unit_offset: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Normalise `x` [..., N], whose last dimension is dense and whose others may be strided.

    weight: [N]. residual: like x. Returns y, or (y, x + residual) when a residual is given; no
    argument is written to.
    """
    if residual is not None:
        x = x + residual
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = (wide * (weight.float() + 1.0 if unit_offset else weight.float())).to(x.dtype)
    return y if residual is None else (y, x)


def rmsnorm_cost(
    x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None, **_: Any
) -> Cost:
    passes = 2 if residual is None else 4
    moved = passes * x.numel() * x.element_size() + weight.numel() * weight.element_size()
    return Cost(bytes=moved, flops=(4 if residual is None else 5) * x.numel())


def _case(shape: tuple[int, ...], *, residual: bool, unit_offset: bool = False) -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        def normal(*size: int) -> torch.Tensor:
            values = torch.randn(*size, generator=generator, device=generator.device)
            return values.to(device, dtype)

        return {
            "x": normal(*shape) * 3,
            "weight": normal(shape[-1]),
            "eps": 1e-6,
            "residual": normal(*shape) if residual else None,
            "unit_offset": unit_offset,
        }

    dims = "x".join(str(size) for size in shape)
    label = dims + ("-residual" if residual else "") + ("-unit_offset" if unit_offset else "")
    return Case(label, make)


def _strided_heads() -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        qkv = torch.randn(5, 8 * 96, generator=generator, device=generator.device).to(device, dtype)
        weight = torch.randn(96, generator=generator, device=generator.device).to(device, dtype)
        return {"x": qkv[:, : 4 * 96].unflatten(1, (4, 96)), "weight": weight, "eps": 1e-5}

    return Case("heads-of-strided-qkv", make)


CASES = (
    _case((1, 1024), residual=False),
    _case((7, 1000), residual=False, unit_offset=True),
    _case((33, 4096), residual=True),
    _case((3, 1153), residual=True, unit_offset=True),
    _case((5, 3, 128), residual=False),
    _case((0, 256), residual=True),
    _strided_heads(),
)

rmsnorm = Op(
    "rmsnorm",
    rmsnorm_reference,
    implementations=[
        Implementation("portable", "cuda", "minisgl.kernels.rmsnorm.portable:rmsnorm_portable"),
        Implementation("cpu", "cpu", "minisgl.kernels.rmsnorm.cpu:rmsnorm_cpu"),
    ],
    cases=CASES,
    cost=rmsnorm_cost,
    expected=[Expected("rmsnorm_kernel", WIDE)],
)
