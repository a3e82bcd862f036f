"""Pages of KV gathered into a dense staging buffer, and scattered back from it.

Meant for a second cache tier: what one launch gathers from all layers, one copy can move. The
staging buffer may be pinned host memory, which a GPU reads and writes directly.
"""

from typing import Any

import torch

from minisgl.kernels.op import WIDE, Case, Cost, Expected, Implementation, Op


def gather_pages_reference(
    storage: torch.Tensor, pages: torch.Tensor, staging: torch.Tensor
) -> None:
    """staging[n] = page pages[n] of every layer, bit for bit.

    storage: [L, 2, slots, Hkv, D]. pages: [N] int32, -1 to skip. staging: [N, L, 2, page_size,
    Hkv, D], written in place.
    """
    page_size = staging.shape[3]
    for n, page in enumerate(pages.tolist()):
        if page >= 0:
            staging[n] = storage[:, :, page * page_size : (page + 1) * page_size]


def scatter_pages_reference(
    storage: torch.Tensor, pages: torch.Tensor, staging: torch.Tensor
) -> None:
    """The inverse of `gather_pages`: page pages[n] of `storage`, in place, becomes staging[n].

    No page is named twice.
    """
    page_size = staging.shape[3]
    for n, page in enumerate(pages.tolist()):
        if page >= 0:
            storage[:, :, page * page_size : (page + 1) * page_size] = staging[n]


def _cost(storage: torch.Tensor, pages: torch.Tensor, staging: torch.Tensor) -> Cost:
    moved = int((pages >= 0).sum()) * staging[0].numel() * staging.element_size()
    return Cost(bytes=2 * moved + pages.numel() * pages.element_size(), flops=0)


def _case(layers: int, kv_heads: int, head_dim: int, page_size: int, count: int) -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        total, on = count + 3, generator.device
        shape = (layers, 2, total * page_size, kv_heads, head_dim)
        staged = (count, layers, 2, page_size, kv_heads, head_dim)
        pages = torch.randperm(total, generator=generator, device=on)[:count]
        pages[2::3] = -1
        return {
            "storage": torch.randn(shape, generator=generator, device=on).to(device, dtype),
            "pages": pages.to(device, torch.int32),
            "staging": torch.randn(staged, generator=generator, device=on).to(device, dtype),
        }

    return Case(f"L{layers}-Hkv{kv_heads}-D{head_dim}-page{page_size}-N{count}", make)


CASES = (_case(2, 2, 128, 16, 4), _case(3, 1, 80, 1, 5), _case(1, 3, 64, 64, 1))

UNSERVED = {"portable": [_case(32, 8, 128, 16, 1)]}

_PORTABLE = "minisgl.kernels.kv_staging.portable:"
gather_pages = Op(
    "gather_pages",
    gather_pages_reference,
    implementations=[Implementation("portable", "cuda", _PORTABLE + "gather_pages_portable")],
    cases=CASES,
    cost=_cost,
    variants=UNSERVED,
    expected=[Expected("stage_pages_kernel", WIDE)],
)
scatter_pages = Op(
    "scatter_pages",
    scatter_pages_reference,
    implementations=[Implementation("portable", "cuda", _PORTABLE + "scatter_pages_portable")],
    cases=CASES,
    cost=_cost,
    variants=UNSERVED,
)
