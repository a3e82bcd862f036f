"""No figure without a check: the call that is timed is first compared with an fp32 oracle."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.kernels.workload import Arguments, Workload
from minisgl.kernels.attention.paged import PagedKV

QUERIES = 32  # of one sequence that an attention's check looks at
SLACK = 1e-5  # relative: float32 in another order


class WrongResult(RuntimeError):
    """An implementation is less exact than twice plain PyTorch in the same type."""


def check(workload: Workload, function: Callable[..., Any], arguments: Arguments) -> float:
    """The relative error of an implementation against fp32; WrongResult beyond the tolerance.

    The tolerance comes from data: twice the error of plain PyTorch in the arguments' own type.
    Attention is compared at the last queries of the first and last sequence, everything else whole.
    """
    op = workload.op
    if op.name in ("attention", "decode", "cascade"):
        out = function(**arguments)
        triples = list(_attention_triples(arguments, out))
    else:
        ours, plain, exact = (_copied(arguments) for _ in range(3))
        exact = {name: _widened(value) for name, value in exact.items()}
        results = (
            _tensors(function(**ours), ours),
            _tensors(op.reference(**plain), plain),
            _tensors(op.reference(**exact), exact),
        )
        triples = list(zip(*results, strict=True))
    worst = 0.0
    for found, want, exact_value in triples:
        if not found.is_floating_point():
            if not torch.equal(found, want):
                raise WrongResult("differs")
            continue
        error, allowed = (_distance(x, exact_value) for x in (found, want))
        if not error <= 2 * allowed + SLACK:
            raise WrongResult(f"is off by {error:.2e}, plain PyTorch by {allowed:.2e}")
        worst = max(worst, error)
    return worst


def _attention_triples(
    arguments: Arguments, out: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(ours, plain PyTorch in the same type, fp32) of the last queries of two sequences."""
    kv: PagedKV = arguments["kv"]
    table, size = kv.page_table, kv.page_size
    offsets = arguments.get("cu_seqlens_q")
    for s in {0, len(table) - 1}:
        if offsets is None:
            width = arguments.get("width", 1)
            start, end = s * width, (s + 1) * width
        else:
            start, end = offsets[s : s + 2].tolist()
        length = int(kv.seq_lens[s])
        n = min(end - start, QUERIES)
        j = torch.arange(length, device=out.device)
        slots = table[s, j // size].long() * size + j % size
        q = arguments["q"][end - n : end]
        k, v = kv.k_pool[slots], kv.v_pool[slots]
        plain = _attend(q, k, v, kv.scale)
        exact = _attend(q.float(), k.float(), v.float(), kv.scale)
        yield out[end - n : end], plain, exact


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The n last queries of a sequence, op by op. q: [n, Hq, D]; k, v: [L, Hkv, D]."""
    n, length, groups = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    grouped = q.unflatten(1, (-1, groups))
    scores = torch.einsum("nhgd,lhd->hgnl", grouped, k) * scale
    positions = torch.arange(length - n, length, device=q.device)[:, None]
    hidden = torch.arange(length, device=q.device) > positions
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
    return torch.einsum("hgnl,lhd->nhgd", weights, v).flatten(1, 2)


def _distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """||found - exact|| / ||exact|| where they differ or are finite; NaN where found has one."""
    ours, wanted = found.float(), exact.float()
    difference = torch.where(ours == wanted, 0.0, ours - wanted).norm()
    norm = torch.where(wanted.isfinite(), wanted, 0.0).norm()
    return float(difference / norm.clamp(min=1e-30))


def _copied(arguments: Arguments) -> Arguments:
    return {
        name: _clone(value) if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }


def _clone(value: torch.Tensor) -> torch.Tensor:
    """A copy in the same kind of memory: a kernel can read the host's only where it is pinned."""
    pinned = value.device.type == "cpu" and value.is_pinned()
    return value.clone().pin_memory() if pinned else value.clone()


def _widened(value: Any) -> Any:
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float() if floating else value


def _tensors(result: Any, arguments: Arguments) -> list[torch.Tensor]:
    """All that a call leaves behind: its results, and its arguments afterwards."""
    results = result if isinstance(result, tuple | list) else (result,)
    values = [*results, *arguments.values()]
    return [value for value in values if isinstance(value, torch.Tensor)]
