"""Log-probabilities: of one token per row, and of the row's most likely ones.

log p(i) = x_i - log(sum_j exp(x_j)); the other tokens' probabilities are not written.
"""

from typing import Any

import torch

from minisgl.kernels.op import Case, Cost, Expected, Implementation, Op

MAX_TOP = 32  # most likely tokens, at most


def logprobs_reference(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits: [P, V] fp32; token_ids: [P] int32; num_top: at most min(V, MAX_TOP).

    Returns the tokens' log-probabilities [P] fp32, the ids [P, num_top] int32 of the largest
    logits, in descending order (equal ones in any), and their log-probabilities [P, num_top] fp32.
    """
    total = logits.logsumexp(dim=1)
    chosen = logits.gather(1, token_ids.long()[:, None]).squeeze(1) - total
    top = logits.topk(num_top, dim=1)
    return chosen, top.indices.int(), top.values - total[:, None]


def _cost(logits: torch.Tensor, **_: Any) -> Cost:
    return Cost(bytes=logits.numel() * 4, flops=logits.numel() * 4)


def _case(label: str, rows: int, vocab: int, num_top: int, masked: bool = False) -> Case:
    """`masked`: all but `num_top` logits of each row are -inf."""

    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        on = generator.device
        logits = torch.randn(rows, vocab, generator=generator, device=on) * 4
        if masked:
            order = torch.randn(rows, vocab, generator=generator, device=on).argsort(1)
            logits = torch.where(order < num_top, logits, -torch.inf)
        wide = torch.full((rows, vocab + 3), torch.nan, device=on)  # rows lie apart
        wide[:, :vocab] = logits
        token_ids = torch.randint(0, vocab, (rows,), generator=generator, device=on)
        return {
            "logits": wide.to(device)[:, :vocab],
            "token_ids": token_ids.to(device, torch.int32),
            "num_top": num_top,
        }

    return Case(label, make)


logprobs = Op(
    "logprobs",
    logprobs_reference,
    implementations=[
        Implementation("portable", "cuda", "minisgl.kernels.logprobs.portable:logprobs_portable"),
        Implementation("torch", "cuda", "minisgl.kernels.logprobs:logprobs_reference"),
    ],
    cases=(
        _case("none", 3, 131, 0),
        _case("one", 1, 7, 1),
        _case("pieces", 5, 9_001, 20),
        _case("all", 4, 30, 30),
        _case("masked", 3, 5_000, 4, masked=True),
    ),
    cost=_cost,
    expected=[Expected("piece_kernel", ("load128",), lambda facts: facts["V"] % 4 == 0)],
)
