"""What a draft model's passes do around the model: a pass's inputs from the state of each row, and
the drafts that it samples kept for the next pass.

For D rows, of which each is to have up to K drafts, pass j's inputs are for row d, r = asked[0, d]

    pass 0      previous[r], last[r]   from position lengths[r] - 1 on; all drafts become -1
    pass j      draft j - 1            at position lengths[r] + j

asked[1 + j, d] of these tokens are the row's own, the rest is padding; draft j stands at position
lengths[r] + 1 + j. The number of the pass lies on the device: one graph serves all but the first.
"""

from typing import Any

import torch

from minisgl.kernels.op import Case, Cost, Implementation, Op


def prepare_proposals_reference(
    asked: torch.Tensor,
    drafted: torch.Tensor,
    nth: torch.Tensor,
    last: torch.Tensor,
    previous: torch.Tensor,
    lengths: torch.Tensor,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """asked: [1 + K, D] int32. drafted: [D, K] int32. nth: [1] int64. last, previous, lengths: [R]
    int32. width: 2 in pass 0, else 1.

    Returns token_ids [D * width], starts [D] and num_tokens [D] int32, positions [D] int64.
    """
    own = asked[0]
    length = lengths.index_select(0, own)
    if width > 1:
        drafted.fill_(-1)
        two = previous.index_select(0, own), last.index_select(0, own)
        ids, starts = torch.stack(two, 1).view(-1), length - 1
    else:
        ids, starts = drafted.index_select(1, nth - 1).view(-1), length + nth.int()
    num_tokens = asked[1:].index_select(0, nth).view(-1)
    return ids, starts, num_tokens, (length + 1).long() + nth


def keep_proposals_reference(
    tokens: torch.Tensor, drafted: torch.Tensor, nth: torch.Tensor
) -> None:
    """Tokens [D] int32 become the drafts of pass nth [1] int64 in drafted [D, K] int32."""
    drafted.index_copy_(1, nth, tokens[:, None])


def _prepare_cost(asked: torch.Tensor, **_: Any) -> Cost:
    return Cost(bytes=asked.shape[1] * 48, flops=asked.shape[1] * 6)


def _keep_cost(tokens: torch.Tensor, **_: Any) -> Cost:
    return Cost(bytes=tokens.numel() * 8, flops=0)


def _case(nth: int, keeps: bool = False) -> Case:
    """Five of eight rows in pass `nth`, which may have up to four drafts."""

    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        def integers(most: int, *shape: int) -> torch.Tensor:
            made = torch.randint(0, most, shape, generator=generator, device=generator.device)
            return made.to(device, torch.int32)

        place = torch.tensor([nth], device=device)
        if keeps:
            return {"tokens": integers(99, 5), "drafted": integers(99, 5, 4), "nth": place}
        asked = integers(3, 5, 5)
        asked[0] = torch.randperm(8, generator=generator, device=generator.device)[:5]
        state = {name: integers(99, 8) for name in ("last", "previous", "lengths")}
        facts = {"asked": asked, "drafted": integers(99, 5, 4), "nth": place}
        return facts | state | {"width": 1 if nth else 2}

    return Case(f"pass {nth}", make)


_CPU = "minisgl.kernels.propose.cpu:"
_TORCH = "minisgl.kernels.propose:"

prepare_proposals = Op(
    "prepare_proposals",
    prepare_proposals_reference,
    implementations=[
        Implementation("cpu", "cpu", _CPU + "prepare_proposals_cpu"),
        Implementation("torch", "cuda", _TORCH + "prepare_proposals_reference"),
    ],
    cases=(_case(0), _case(1), _case(3)),
    cost=_prepare_cost,
)
keep_proposals = Op(
    "keep_proposals",
    keep_proposals_reference,
    implementations=[
        Implementation("cpu", "cpu", _CPU + "keep_proposals_cpu"),
        Implementation("torch", "cuda", _TORCH + "keep_proposals_reference"),
    ],
    cases=(_case(0, keeps=True), _case(3, keeps=True)),
    cost=_keep_cost,
)
