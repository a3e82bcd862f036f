"""Decode attention where groups of sequences begin with the same pages.

The result is `decode`'s. Sequences groups[g] = (first, count, pages) name `count` sequences from
`first` on whose first `pages` page-table entries are equal; the keys and values there are read once
for the whole group instead of once per sequence, and the two parts of each sequence's attention
are put together, on a GPU by `merge`. Sources: Juravsky et al., "Hydragen", 2024; Ye et al.,
"Cascade Inference", 2024.
"""

from typing import Any

import torch

from minisgl.kernels.attention.paged import Attended, PagedKV, paged_case
from minisgl.kernels.decode import decode_cost, decode_reference
from minisgl.kernels.op import Case, Cost, Expected, Implementation, Op


def cascade_reference(
    q: torch.Tensor,
    kv: PagedKV,
    groups: torch.Tensor,
    shared: torch.Tensor,
    *,
    width: int = 1,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> Attended:
    """Returns what `decode` does for the same arguments, which have no window.

    groups: [G, 3] int32, disjoint; a count of 0 is padding. shared: [S] int32, the keys a sequence
    shares with its group, pages * page_size, or 0 outside every group; at most seq_lens - width,
    so that every query of the group sees them all.
    """
    check_window(kv)
    return decode_reference(q, kv, width=width, return_lse=return_lse, out=out)


def check_window(kv: PagedKV) -> None:
    """Raises ValueError for a window: it would leave out what the groups share."""
    if kv.window is not None:
        raise ValueError(f"cascade needs attention without a window, got {kv.window}")


def cascade_cost(
    q: torch.Tensor, kv: PagedKV, groups: torch.Tensor, *, width: int = 1, **_: Any
) -> Cost:
    """As `decode`, less the bytes of shared keys and values that are not read again."""
    plain = decode_cost(q, kv, width=width)
    again = sum((count - 1) * pages for _, count, pages in groups.tolist() if count)
    saved = 2 * again * kv.page_size * kv.k_pool[0].numel() * kv.k_pool.element_size()
    return Cost(bytes=plain.bytes - saved, flops=plain.flops)


def cascade_case(
    label: str,
    lengths: list[int],
    groups: list[tuple[int, int, int]],
    *,
    width: int = 1,
    **facts: Any,
) -> Case:
    """Sequences of such lengths in such groups; `facts` are of `paged_case`."""

    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        made = paged_case(len(lengths) * width, lengths, device, dtype, generator, **facts)
        kv: PagedKV = made["kv"]
        table, rows = kv.page_table, kv.rows.tolist()
        shared = torch.zeros(len(lengths), dtype=torch.int32)
        for first, count, pages in groups:
            for s in range(first, first + count):
                table[rows[s], :pages] = table[rows[first], :pages]
                shared[s] = pages * kv.page_size
        plan = torch.tensor(groups, dtype=torch.int32).reshape(-1, 3).to(device)
        return made | {"groups": plan, "shared": shared.to(device), "width": width}

    return Case(label, make)


CASES = (
    cascade_case("one-group", [70, 81, 100, 65], [(0, 4, 4)], head_dim=64),
    cascade_case(
        "two-groups", [40, 33, 7, 66, 300], [(0, 2, 2), (3, 2, 4), (0, 0, 0)], head_dim=128
    ),
    cascade_case("no-group", [17, 0, 64], [(0, 0, 0)], head_dim=64),
    cascade_case("page1", [20, 31, 25], [(0, 3, 17)], head_dim=64, page_size=1),
    cascade_case("page64-gqa4", [130, 200], [(0, 2, 1)], head_dim=128, page_size=64, q_heads=8),
    cascade_case("drafts-lse", [50, 60, 70], [(1, 2, 3)], head_dim=80, width=3, return_lse=True),
    cascade_case("softcap", [33, 40], [(0, 2, 1)], head_dim=128, softcap=5.0, page_size=32),
    cascade_case("256-shared", [300, 275, 60, 290], [(0, 2, 17), (2, 2, 3)], head_dim=64),
    cascade_case("512-page1", [531, 520, 517], [(0, 3, 514)], head_dim=80, page_size=1, width=3),
    cascade_case("many-rows", [620, 590, 577, 601, 580], [(0, 5, 36)], head_dim=64, q_heads=16),
)

cascade = Op(
    "cascade",
    cascade_reference,
    implementations=[
        Implementation("portable", "cuda", "minisgl.kernels.cascade.portable:cascade_portable"),
        Implementation("cpu", "cpu", "minisgl.kernels.cascade.cpu:cascade_cpu"),
    ],
    cases=CASES,
    cost=cascade_cost,
    expected=[Expected("prefix_kernel", ("load128", "wgmma"))],
)
