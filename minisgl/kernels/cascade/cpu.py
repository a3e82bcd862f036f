"""Cascade decode on CPU: one matrix product per group for the shared keys, one per sequence after.

It shows that plans are right. A CPU's decode is bound by arithmetic, which cascade does not save,
so the engine plans no groups there unless it is told to.
"""

import torch

from minisgl.kernels.attention.cpu import attend, attention_cpu, sequence_slots
from minisgl.kernels.merge import merge_reference


def cascade_cpu(
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    page_table: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    groups: torch.Tensor,
    shared: torch.Tensor,
    *,
    page_size: int,
    scale: float,
    width: int = 1,
    softcap: float | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `cascade_reference`.

    What follows the shared keys is a shorter sequence: attention knows no positions but the order.
    """
    count, max_pages = seq_lens.shape[0], page_table.shape[1]
    rest = seq_lens - shared
    num_pages = -(-int(rest.max()) // page_size) if count else 0
    pages = (shared // page_size)[:, None] + torch.arange(num_pages)
    own, own_lse = attention_cpu(
        q,
        k_pool,
        v_pool,
        page_table[rows.long()[:, None], pages.clamp(max=max_pages - 1)],
        torch.arange(count, dtype=torch.int32),
        torch.arange(count + 1, dtype=torch.int32) * width,
        rest,
        page_size=page_size,
        scale=scale,
        softcap=softcap,
        return_lse=True,
        out=torch.empty(q.shape, dtype=torch.float32),
    )
    head, head_lse = torch.empty_like(own), torch.full_like(own_lse, -torch.inf)
    for first, members, num_shared in groups.tolist():
        if members:
            length = num_shared * page_size
            slots = sequence_slots(page_table[int(rows[first])], 0, length, page_size)
            queries = slice(first * width, (first + members) * width)
            attend(
                q[queries],
                k_pool[slots],
                v_pool[slots],
                head[queries],
                head_lse[queries],
                first_position=length,
                scale=scale,
                window=None,
                softcap=softcap,
            )
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype)
    _, lse = merge_reference(torch.stack([head, own]), torch.stack([head_lse, own_lse]), out=out)
    return (out, lse) if return_lse else out
