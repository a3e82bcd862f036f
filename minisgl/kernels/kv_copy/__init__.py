"""Copying the first tokens of one page to another, in all layers at once.

This is the prefix cache's copy job: where two prompts diverge inside a page, the shared tokens are
copied to a fresh page and prefill starts at the first token that differs.
"""

from typing import Any

import torch

from minisgl.kernels.op import WIDE, Case, Cost, Expected, Implementation, Op


def copy_pages_reference(storage: torch.Tensor, jobs: torch.Tensor, page_size: int) -> None:
    """Run copy jobs inside `storage` [L, 2, slots, Hkv, D], in place, bit for bit.

    jobs: [J, 3] int32 of (source page, destination page, n): the first n tokens of the source,
    0 <= n <= page_size, become the destination's first n. n = 0 is padding. No page is both a
    source and a destination, nor twice a destination; one may be a source several times.
    """
    for source, destination, n in jobs.tolist():
        to, start = destination * page_size, source * page_size
        storage[:, :, to : to + n] = storage[:, :, start : start + n]


def copy_pages_cost(storage: torch.Tensor, jobs: torch.Tensor, **_: Any) -> Cost:
    tokens = int(jobs[:, 2].sum())
    per_token = storage[:, :, 0].numel() * storage.element_size()
    return Cost(bytes=2 * tokens * per_token + jobs.numel() * jobs.element_size(), flops=0)


def _case(layers: int, kv_heads: int, head_dim: int, page_size: int, jobs: int) -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        on = generator.device
        pages = 2 * jobs + 3
        shape = (layers, 2, pages * page_size, kv_heads, head_dim)
        storage = torch.randn(shape, generator=generator, device=on).to(device, dtype)
        order = torch.randperm(pages, generator=generator, device=on)
        counts = torch.randint(0, page_size + 1, (jobs,), generator=generator, device=on)
        sources = order[jobs : 2 * jobs].clone()
        sources[1::2] = sources[:1]  # several copies of one page
        table = torch.stack((sources, order[:jobs], counts), dim=1).int()
        return {"storage": storage, "jobs": table.to(device), "page_size": page_size}

    return Case(f"L{layers}-Hkv{kv_heads}-D{head_dim}-page{page_size}-J{jobs}", make)


CASES = (
    _case(3, 2, 128, 16, 4),
    _case(2, 3, 80, 64, 5),
    _case(2, 1, 64, 1, 3),
    _case(1, 2, 64, 32, 0),
)

copy_pages = Op(
    "copy_pages",
    copy_pages_reference,
    implementations=[
        Implementation("portable", "cuda", "minisgl.kernels.kv_copy.portable:copy_pages_portable")
    ],
    cases=CASES,
    cost=copy_pages_cost,
    expected=[Expected("copy_pages_kernel", WIDE)],
)
