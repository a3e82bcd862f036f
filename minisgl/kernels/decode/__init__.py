"""Attention of sequences that each have the same few queries: decoding, with or without drafts.

The mathematics and the paged layout of `attention`, with n = width for every sequence, so that
shapes are known before lengths are: a launch may be captured in a graph and replayed. width is
1 + drafts. With few queries a step reads far more than it computes, and the cost is the keys and
values read once.
"""

from typing import Any

import torch

from minisgl.kernels.attention import attention_cost, attention_reference
from minisgl.kernels.attention.paged import Attended, PagedKV, paged_case
from minisgl.kernels.op import Case, Cost, Expected, Implementation, Op


def _offsets(seq_lens: torch.Tensor, width: int) -> torch.Tensor:
    count = seq_lens.shape[0] + 1
    return torch.arange(count, dtype=torch.int32, device=seq_lens.device) * width


def decode_reference(
    q: torch.Tensor,
    kv: PagedKV,
    *,
    width: int = 1,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
) -> Attended:
    """Returns out [S * width, Hq, D] in q's dtype, and lse [S * width, Hq] fp32 if asked for.

    q: [S * width, Hq, D], sequence by sequence. A sequence of length 0 is padding and gives 0 and
    lse -inf, as does any query that sees no key. Everything else is as `attention` has it.
    """
    return attention_reference(q, kv, _offsets(kv.seq_lens, width), return_lse=return_lse, out=out)


def decode_cost(q: torch.Tensor, kv: PagedKV, *, width: int = 1, **_: Any) -> Cost:
    return attention_cost(q, kv, _offsets(kv.seq_lens, width))


def _case(label: str, lengths: list[int], *, width: int = 1, **facts: Any) -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        tokens = len(lengths) * width
        return paged_case(tokens, lengths, device, dtype, generator, **facts) | {"width": width}

    return Case(label, make)


CASES = (
    _case("D64", [1, 63, 64, 65], head_dim=64),
    _case("D128-gqa4", [300, 1, 130], head_dim=128, q_heads=8, kv_heads=2),
    _case("D128-padding", [0, 17, 0, 33], head_dim=128),
    _case("D80-page1", [65, 7], head_dim=80, page_size=1),
    _case("D96-page64-mha", [130, 64], head_dim=96, q_heads=3, kv_heads=3, page_size=64),
    _case("D256-gqa8", [65, 40], head_dim=256, q_heads=8, kv_heads=1),
    _case("D128-gqa32", [70], head_dim=128, q_heads=32, kv_heads=1, page_size=32),
    _case("window-D128", [130, 20], head_dim=128, window=24),
    _case("window1-D64", [70, 1], head_dim=64, window=1),
    _case("softcap-D256", [80, 9], head_dim=256, softcap=5.0),
    _case("width4-D128", [4, 66, 0, 131], head_dim=128, width=4),
    _case("width3-window-D64", [3, 66], head_dim=64, width=3, window=5),
    _case("width5-short", [2, 7], head_dim=128, width=5, return_lse=True),
    _case("lse-D128", [75, 0, 300], head_dim=128, return_lse=True),
)

UNSERVED = _case("lse", [224] * 40, head_dim=128, q_heads=32, kv_heads=8, return_lse=True)

decode = Op(
    "decode",
    decode_reference,
    implementations=[
        Implementation("portable", "cuda", "minisgl.kernels.decode.portable:decode_portable"),
        Implementation("cpu", "cpu", "minisgl.kernels.decode.cpu:decode_cpu"),
    ],
    cases=CASES,
    cost=decode_cost,
    variants={"portable": [UNSERVED]},
    expected=[Expected("decode_kernel", ("load128",))],
)
