"""What a user would call instead of our kernels outside of attention, on the same inputs.

A baseline is given an op's arguments and returns the call to time, or None where it does not apply.
What a program would prepare once (slot indices, expanded masks) is not timed.
"""

import torch
import torch.nn.functional as F

from benchmarks.kernels.workload import Arguments, Baseline, Call
from minisgl.kernels.matrix import unpacked
from minisgl.kernels.op import Op


def reference_of(op: Op) -> Baseline:
    """The op's own specification in eager PyTorch."""
    return lambda arguments: lambda: op.reference(**arguments)


def _norm(a: Arguments) -> Call:
    return lambda: F.rms_norm(a["x"], a["weight"].shape, a["weight"], a["eps"])


def _add_norm(a: Arguments) -> Call:
    def call() -> tuple[torch.Tensor, torch.Tensor]:
        total = a["x"] + a["residual"]
        return F.rms_norm(total, a["weight"].shape, a["weight"], a["eps"]), total

    return call


def _activation(a: Arguments) -> Call:
    def call() -> torch.Tensor:
        gate, up = a["x"].chunk(2, dim=-1)
        return F.silu(gate) * up

    return call


def _copy_pages(a: Arguments) -> Call:
    storage, size = a["storage"], a["page_size"]
    place = torch.arange(size, device=storage.device)
    count = int(a["jobs"][0, 2])
    source, target = (
        (a["jobs"][:, i].long()[:, None] * size + place[:count]).flatten() for i in (0, 1)
    )
    return lambda: storage.index_copy_(2, target, storage.index_select(2, source))


def _pages(a: Arguments) -> torch.Tensor:
    """The storage by pages, [L, 2, pages, page_size, Hkv, D]."""
    return a["storage"].unflatten(2, (-1, a["staging"].shape[3]))


def _gather(a: Arguments) -> Call:
    pages, wanted = _pages(a), a["pages"].long()

    def call() -> None:
        gathered = pages.index_select(2, wanted).permute(2, 0, 1, 3, 4, 5)
        a["staging"].copy_(gathered, non_blocking=True)

    return call


def _scatter(a: Arguments) -> Call:
    pages, wanted = _pages(a), a["pages"].long()

    def call() -> None:
        sent = a["staging"].to(pages.device, non_blocking=True)
        pages.index_copy_(2, wanted, sent.permute(1, 2, 0, 3, 4, 5))

    return call


def _route(a: Arguments) -> Call:
    def call() -> tuple[torch.Tensor, torch.Tensor]:
        weights, ids = torch.softmax(a["logits"].float(), dim=1).topk(a["top_k"], dim=1)
        return weights / weights.sum(1, keepdim=True), ids

    return call


def _mask(a: Arguments) -> Call:
    """A boolean mask, unpacked before, as libraries without packed masks use."""
    logits, shifts = a["logits"], torch.arange(32, device=a["bits"].device)
    refused = ((a["bits"][:, :, None] >> shifts) & 1).flatten(1)[:, : logits.shape[1]] == 0
    rows = a["indices"].long().argsort()
    refused = refused[rows]
    return lambda: logits.masked_fill_(refused, -torch.inf)


def _matmul(a: Arguments) -> Call:
    return lambda: F.linear(a["x"], a["weight"])


def _matmul_of_floats(a: Arguments) -> Call:
    weight = unpacked(a["weight"])
    return lambda: F.linear(a["x"], weight)


def sampling(fields: dict[str, float]) -> dict[str, Baseline]:
    """argmax, or softmax with a filter where one is on, and torch.multinomial."""

    def baseline(a: Arguments) -> Call:
        logits = a["logits"]
        temperature = fields["temperature"]
        if temperature == 0:
            return lambda: logits.argmax(dim=1)

        def call() -> torch.Tensor:
            probabilities = torch.softmax(logits / temperature, dim=1)
            if "min_p" in fields:
                least = fields["min_p"] * probabilities.amax(1, keepdim=True)
                probabilities = torch.where(probabilities < least, 0.0, probabilities)
            if "top_p" in fields:
                ordered, ids = probabilities.sort(dim=1, descending=True)
                ordered[ordered.cumsum(dim=1) - ordered > fields["top_p"]] = 0.0
                ordered[:, int(fields.get("top_k", logits.shape[1])) :] = 0.0
                return ids.gather(1, torch.multinomial(ordered, 1))
            return torch.multinomial(probabilities, 1)

        return call

    return {"argmax" if fields["temperature"] == 0 else "softmax, multinomial": baseline}


NORM: dict[str, Baseline] = {"F.rms_norm": _norm}
ADD_NORM: dict[str, Baseline] = {"add, F.rms_norm": _add_norm}
ACTIVATION: dict[str, Baseline] = {"F.silu, mul": _activation}
COPY_PAGES: dict[str, Baseline] = {"index_copy_": _copy_pages}
GATHER_PAGES: dict[str, Baseline] = {"index_select, copy_": _gather}
SCATTER_PAGES: dict[str, Baseline] = {"copy, index_copy_": _scatter}
ROUTE: dict[str, Baseline] = {"softmax, topk": _route}
MASK: dict[str, Baseline] = {"masked_fill_": _mask}
LINEAR: dict[str, Baseline] = {"F.linear": _matmul}
GROUPED_LINEAR: dict[str, Baseline] = {"F.linear, floats": _matmul_of_floats}
