"""All workloads, those that goals depend on first: a run that is out of time leaves out others."""

from collections.abc import Iterator

from benchmarks.kernels import attention_work, product_work, sampling_work, token_work
from benchmarks.kernels.workload import Workload


def workloads(*, small: bool) -> Iterator[Workload]:
    """Every op at the shapes models use it with; `small` ones end in seconds on a CPU."""
    yield from attention_work.decodes(small)
    yield from attention_work.prefills(small)
    yield from attention_work.cascades(small)
    yield from sampling_work.samples(small)
    yield from token_work.rowwise(small)
    yield from token_work.heads(small)
    yield from attention_work.merges(small)
    yield from product_work.products(small)
    yield from product_work.products_in_codes(small)
    yield from product_work.mixtures(small)
    yield from sampling_work.logits(small)
    yield from token_work.pages(small)
    yield from token_work.steps(small)
    yield from token_work.proposals(small)
