"""What all attention ops share: their paged arguments, cases of them, and counted work."""

from typing import Any, NamedTuple

import torch

Attended = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # out, or (out, lse)


class PagedKV(NamedTuple):
    """The keys and values in pages that S sequences attend to, and how their scores are made.

    Key j of sequence s lies in slot page_table[rows[s], j // page_size] * page_size + j % page_size
    of the pools. (A tuple, because every layer makes one in every step.)
    """

    k_pool: torch.Tensor  # [slots, Hkv, D], dense; unused slots hold any finite value
    v_pool: torch.Tensor  # like k_pool
    page_table: torch.Tensor  # [max_rows, max_pages] int32
    rows: torch.Tensor  # [S] int32
    seq_lens: torch.Tensor  # [S] int32: keys of a sequence, those of its queries included
    page_size: int
    scale: float  # of q . k
    window: int | None = None  # a query sees its own key and the window - 1 before it
    softcap: float | None = None


def visible_pairs(queries: int, length: int, window: int | None) -> int:
    """(query, visible key) pairs of one sequence: the work its attention cannot avoid."""
    pairs = 0
    for position in range(max(length - queries, 0), length):
        pairs += position + 1 if window is None else min(position + 1, window)
    return pairs


def paged_case(
    tokens: int,
    lengths: list[int],
    device: torch.device,
    dtype: torch.dtype,
    generator: torch.Generator,
    *,
    head_dim: int,
    q_heads: int = 6,
    kv_heads: int = 2,
    page_size: int = 16,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> dict[str, Any]:
    """Arguments of an attention op: pages and rows shuffled, unused slots filled with 1000.

    q is the head of a wider projection, so its rows are strided. Table entries past a sequence's
    pages name no page of the pool.
    """
    on = generator.device
    counts = [-(-length // page_size) for length in lengths]
    num_pages = sum(counts) + 3
    pages = torch.randperm(num_pages, generator=generator, device=on)
    max_rows = len(lengths) + 2
    rows = torch.randperm(max_rows, generator=generator, device=on)[: len(lengths)]
    page_table = torch.full((max_rows, max(counts) + 2), num_pages * 1000, dtype=torch.int32)
    pools = torch.full((2, num_pages * page_size, kv_heads, head_dim), 1000.0, device=on)
    first = 0
    for row, count, length in zip(rows.tolist(), counts, lengths, strict=True):
        own = pages[first : first + count]
        first += count
        page_table[row, :count] = own.int()
        slots = (own[:, None] * page_size + torch.arange(page_size, device=on)).flatten()[:length]
        pools[:, slots] = torch.randn(2, length, kv_heads, head_dim, generator=generator, device=on)
    projection = torch.randn(tokens, q_heads + 2, head_dim, generator=generator, device=on)
    kv = PagedKV(
        k_pool=pools[0].to(device, dtype),
        v_pool=pools[1].to(device, dtype),
        page_table=page_table.to(device),
        rows=rows.int().to(device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        page_size=page_size,
        scale=head_dim**-0.5,
        window=window,
        softcap=softcap,
    )
    return {"q": projection.to(device, dtype)[:, :q_heads], "kv": kv, "return_lse": return_lse}
