"""Gated activations of the feed-forward block: act(gate) * up, from one fused projection.

    silu_and_mul:       silu(x[..., :N]) * x[..., N:]
    gelu_tanh_and_mul:  gelu_tanh(x[..., :N]) * x[..., N:]

computed in fp32 and rounded once. Source: Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from typing import Any

import torch
import torch.nn.functional as F

from minisgl.kernels.op import WIDE, Case, Cost, Expected, Implementation, Op


def silu_and_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """x: [..., 2N], the gate first, dense in the last dimension. Returns [..., N]."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def gelu_tanh_and_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """x: [..., 2N], the gate first, dense in the last dimension. Returns [..., N]."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate="tanh") * up).to(x.dtype)


def activation_cost(x: torch.Tensor) -> Cost:
    return Cost(bytes=x.numel() * x.element_size() * 3 // 2, flops=5 * x.numel() // 2)


def _case(*shape: int) -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        x = torch.randn(*shape, generator=generator, device=generator.device) * 4
        return {"x": x.to(device, dtype)}

    return Case("x".join(str(size) for size in shape), make)


CASES = (_case(1, 6144), _case(33, 2 * 1000), _case(5, 3, 2 * 129), _case(0, 64))

silu_and_mul = Op(
    "silu_and_mul",
    silu_and_mul_reference,
    implementations=[
        Implementation(
            "portable", "cuda", "minisgl.kernels.activation.portable:silu_and_mul_portable"
        ),
        Implementation("cpu", "cpu", "minisgl.kernels.activation.cpu:silu_and_mul_cpu"),
    ],
    cases=CASES,
    cost=activation_cost,
    expected=[Expected("gated_kernel", WIDE)],
)
gelu_tanh_and_mul = Op(
    "gelu_tanh_and_mul",
    gelu_tanh_and_mul_reference,
    implementations=[
        Implementation(
            "portable", "cuda", "minisgl.kernels.activation.portable:gelu_tanh_and_mul_portable"
        ),
        Implementation("cpu", "cpu", "minisgl.kernels.activation.cpu:gelu_tanh_and_mul_cpu"),
    ],
    cases=CASES,
    cost=activation_cost,
)
