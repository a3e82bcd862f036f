"""Moving keys and values: this step's into their slots, and the head of one page to another.

`write_kv` scatters token t to slot slot_mapping[t] of one layer's pool. `copy_pages` is the
prefix cache's copy job: where two prompts diverge inside a page, the shared tokens are copied to a
fresh page in every layer at once and prefill starts at the exact token.
"""

from typing import Any

import torch

from minisgl.kernels.op import Case, Cost, Implementation, Op


def write_kv_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Write k, v [T, Hkv, D] into k_pool, v_pool [slots, Hkv, D] in place, cast to their dtype.

    slot_mapping: [T] integers, each slot at most once; -1 skips the token. k and v are dense in
    the last dimension, else strided at will.
    """
    kept = (slot_mapping >= 0).nonzero().squeeze(1)
    slots = slot_mapping[kept].long()
    k_pool[slots] = k[kept].to(k_pool.dtype)
    v_pool[slots] = v[kept].to(v_pool.dtype)


def copy_pages_reference(storage: torch.Tensor, jobs: torch.Tensor, page_size: int) -> None:
    """Run copy jobs inside `storage` [L, 2, slots, Hkv, D], in place, bit for bit.

    jobs: [J, 3] int32 of (source page, destination page, n): the first n tokens of the source,
    0 <= n <= page_size, become the destination's first n. n = 0 is padding. No page is both a
    source and a destination, nor twice a destination; one may be a source several times.
    """
    for source, destination, n in jobs.tolist():
        to, start = destination * page_size, source * page_size
        storage[:, :, to : to + n] = storage[:, :, start : start + n]


def write_kv_cost(
    k: torch.Tensor, k_pool: torch.Tensor, slot_mapping: torch.Tensor, **_: Any
) -> Cost:
    moved = 2 * k.numel() * (k.element_size() + k_pool.element_size())
    return Cost(bytes=moved + slot_mapping.numel() * slot_mapping.element_size(), flops=0)


def copy_pages_cost(storage: torch.Tensor, jobs: torch.Tensor, **_: Any) -> Cost:
    tokens = int(jobs[:, 2].sum())
    per_token = storage[:, :, 0].numel() * storage.element_size()
    return Cost(bytes=2 * tokens * per_token + jobs.numel() * jobs.element_size(), flops=0)


def _write_case(tokens: int, kv_heads: int, head_dim: int, *, skip: bool = False) -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        on = generator.device
        slots = 2 * tokens + 5
        qkv = torch.randn(tokens, 4 * kv_heads, head_dim, generator=generator, device=on)
        qkv = qkv.to(device, dtype)
        mapping = torch.randperm(slots, generator=generator, device=on)[:tokens]
        if skip:
            mapping[::3] = -1
        return {
            "k": qkv[:, 2 * kv_heads : 3 * kv_heads],
            "v": qkv[:, 3 * kv_heads :],
            "k_pool": torch.full((slots, kv_heads, head_dim), torch.nan, device=device).to(dtype),
            "v_pool": torch.full((slots, kv_heads, head_dim), torch.nan, device=device).to(dtype),
            "slot_mapping": mapping.to(device),
        }

    return Case(f"T{tokens}-Hkv{kv_heads}-D{head_dim}" + ("-skip" if skip else ""), make)


def _copy_case(layers: int, kv_heads: int, head_dim: int, page_size: int, jobs: int) -> Case:
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


WRITE_CASES = (
    _write_case(1, 8, 128),
    _write_case(65, 2, 80, skip=True),
    _write_case(7, 1, 256, skip=True),
    _write_case(33, 3, 96),
    _write_case(0, 2, 64),
)
COPY_CASES = (
    _copy_case(3, 2, 128, 16, 4),
    _copy_case(2, 3, 80, 64, 5),
    _copy_case(2, 1, 64, 1, 3),
    _copy_case(1, 2, 64, 32, 0),
)

write_kv = Op(
    "write_kv",
    write_kv_reference,
    implementations=[
        Implementation("portable", "cuda", "minisgl.kernels.kv_copy.portable:write_kv_portable")
    ],
    cases=WRITE_CASES,
    cost=write_kv_cost,
)
copy_pages = Op(
    "copy_pages",
    copy_pages_reference,
    implementations=[
        Implementation("portable", "cuda", "minisgl.kernels.kv_copy.portable:copy_pages_portable")
    ],
    cases=COPY_CASES,
    cost=copy_pages_cost,
)
