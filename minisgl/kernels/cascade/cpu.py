"""Cascade decode on CPU: one matrix product per group for the shared keys, one per sequence after.

It is there to test the plans: a CPU's decode is bound by arithmetic, which cascade does not save,
so the engine plans no groups there unless it is told to.
"""

import torch

from minisgl.device.tape import by_call
from minisgl.kernels.attention.cpu import attend, attention_cpu, sequence_slots
from minisgl.kernels.attention.paged import Attended, PagedKV
from minisgl.kernels.cascade import check_window
from minisgl.kernels.merge import merge_reference


@by_call
def cascade_cpu(
    q: torch.Tensor,
    kv: PagedKV,
    groups: torch.Tensor,
    shared: torch.Tensor,
    *,
    width: int = 1,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> Attended:
    """See `cascade_reference`.

    What follows the shared keys is a shorter sequence: only the order of keys matters to attention.
    """
    check_window(kv)
    count, size = len(kv.rows), kv.page_size
    rest = kv.seq_lens - shared
    num_pages = -(-int(rest.max()) // size) if count else 0
    pages = (shared // size)[:, None] + torch.arange(num_pages)
    last = kv.page_table.shape[1] - 1
    own_kv = kv._replace(
        page_table=kv.page_table[kv.rows.long()[:, None], pages.clamp(max=last)],
        rows=torch.arange(count, dtype=torch.int32),
        seq_lens=rest,
    )
    offsets = torch.arange(count + 1, dtype=torch.int32) * width
    space = torch.empty(q.shape, dtype=torch.float32)
    own, own_lse = attention_cpu(q, own_kv, offsets, return_lse=True, out=space)
    head, head_lse = torch.empty_like(own), torch.full_like(own_lse, -torch.inf)
    for first, members, num_shared in groups.tolist():
        if members:
            length = num_shared * size
            slots = sequence_slots(kv.page_table[int(kv.rows[first])], 0, length, size)
            queries = slice(first * width, (first + members) * width)
            attend(
                q[queries],
                kv.k_pool[slots],
                kv.v_pool[slots],
                head[queries],
                head_lse[queries],
                first_position=length,
                scale=kv.scale,
                window=None,
                softcap=kv.softcap,
            )
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype)
    _, lse = merge_reference(torch.stack([head, own]), torch.stack([head_lse, own_lse]), out=out)
    return (out, lse) if return_lse else out
