"""The memory plan, which sizes the KV pool before anything large is allocated."""

from dataclasses import dataclass

from minisgl.device import Memory
from minisgl.log import get_logger
from minisgl.step.kv_pool import KVShape

log = get_logger(__name__)

CPU_TOKENS = 65_536  # the CPU's default pool: at most this many tokens
CPU_BYTES = 4 * 2**30  # and at most this many bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose. `kv` is what is left, and `num_pages` what fits in it."""

    weights: int
    workspace: int
    logits: int
    counts: int
    graphs: int
    kv: int
    num_pages: int
    page_size: int
    budget: int  # what all of the above may take together

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    def table(self) -> str:
        """One line per purpose, in MiB, for the log."""
        purposes = ("weights", "workspace", "logits", "counts", "graphs", "kv", "budget")
        lines = [f"  {name:<10} {getattr(self, name) / 2**20:>10.1f} MiB" for name in purposes]
        pages = f"{self.num_pages} pages of {self.page_size} tokens"
        return "\n".join(["memory plan:", *lines[:-1], f"  {pages}", lines[-1]])


def plan_memory(
    memory: Memory,
    shape: KVShape,
    *,
    draft_shape: KVShape | None = None,
    on_cpu: bool,
    weights: int,
    workspace: int,
    logits: int,
    counts: int,
    graphs: int,
    page_size: int,
    max_context: int,
    mem_fraction_static: float,
    max_total_tokens: int | None,
) -> MemoryPlan:
    """Divide the device's memory. `memory` is measured with the weights loaded. A draft model's
    KV, where there is one, lies on the same pages.

    The budget is `mem_fraction_static` of what was free before the weights. On CPU the pool is
    also at most CPU_TOKENS and CPU_BYTES, unless `max_total_tokens` states its size. Nobody needs
    a pool beyond what is stated. Raises ValueError, with the numbers, when not even one page fits,
    or the stated pool does not.
    """
    budget = int((memory.free + weights) * mem_fraction_static)
    left = budget - weights - workspace - logits - counts - graphs
    page_bytes = shape.bytes_per_token * page_size
    if draft_shape is not None:
        page_bytes += draft_shape.bytes_per_token * page_size
    if max_total_tokens is not None:
        num_pages = max_total_tokens // page_size
        if num_pages < 1:
            raise ValueError(
                f"max_total_tokens must be at least page_size ({page_size}), got {max_total_tokens}"
            )
        if num_pages * page_bytes > left:
            raise ValueError(
                f"max_total_tokens {max_total_tokens} needs {num_pages * page_bytes / 2**20:.0f} "
                f"MiB of KV memory, but mem_fraction_static {mem_fraction_static} leaves "
                f"{max(left, 0) / 2**20:.0f} MiB"
            )
    else:
        num_pages = left // page_bytes
        if on_cpu:
            num_pages = min(num_pages, CPU_TOKENS // page_size, CPU_BYTES // page_bytes)
        if num_pages < 1:
            raise ValueError(
                f"no memory is left for KV: mem_fraction_static {mem_fraction_static} gives "
                f"{budget / 2**20:.0f} MiB, of which {(budget - left) / 2**20:.0f} MiB are taken "
                f"by weights, workspace, logits, counts and graphs; a page needs {page_bytes} bytes"
            )
    plan = MemoryPlan(
        weights=weights,
        workspace=workspace,
        logits=logits,
        counts=counts,
        graphs=graphs,
        kv=num_pages * page_bytes,
        num_pages=num_pages,
        page_size=page_size,
        budget=budget,
    )
    log.info("%s", plan.table())
    if plan.num_tokens < max_context:
        log.warning(
            "the KV pool holds %d tokens, fewer than the context of %d: longer requests are "
            "refused or end early",
            plan.num_tokens,
            max_context,
        )
    return plan


def check_graphs(plan: MemoryPlan, taken: int) -> None:
    """Say what capturing took beside the plan; a warning when it is more."""
    if taken > plan.graphs:
        log.warning(
            "graphs take %.0f MiB, planned were %.0f: lower mem_fraction_static if memory runs out",
            taken / 2**20,
            plan.graphs / 2**20,
        )
    elif taken:
        log.info("graphs take %.0f of %.0f MiB", taken / 2**20, plan.graphs / 2**20)
