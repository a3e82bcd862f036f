"""The memory plan, which sizes the KV pool before anything large is allocated."""

from dataclasses import dataclass, fields

import torch

from minisgl.config import EngineConfig
from minisgl.device import Device
from minisgl.log import get_logger
from minisgl.parallel import Communicator
from minisgl.start.footprint import MODEST_TOKENS, Footprint

log = get_logger(__name__)

MODEST_BYTES = 4 * 2**30  # the most a pool takes on a CPU, unless its size is stated


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose. `kv` is what is left, and `num_pages` what fits in it."""

    needs: Footprint
    kv: int
    num_pages: int
    page_size: int
    budget: int  # what all of the above may take together

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    def table(self) -> str:
        """One line per purpose, in MiB, for the log."""
        needs = {field.name: getattr(self.needs, field.name) for field in fields(self.needs)}
        lines = [
            f"  {name:<10} {taken / 2**20:>10.1f} MiB"
            for name, taken in {**needs, "kv": self.kv, "budget": self.budget}.items()
        ]
        pages = f"{self.num_pages} pages of {self.page_size} tokens"
        return "\n".join(["memory plan:", *lines[:-1], f"  {pages}", lines[-1]])


def plan_memory(
    free: int,
    needs: Footprint,
    token_bytes: int,
    config: EngineConfig,
    max_context: int,
    *,
    modest: bool,
) -> MemoryPlan:
    """Divide the device's memory. `free` is measured with the weights loaded; token_bytes: what a
    token's KV takes.

    The budget is `mem_fraction_static` of what was free before the weights. A `modest` pool is also
    at most MODEST_TOKENS and MODEST_BYTES. A size stated by `max_total_tokens` is used as
    it is, in whole pages; the log says so where that is less.
    Raises ValueError, with the numbers, when not even one page fits, or the stated pool does not.
    """
    page_size, stated = config.page_size, config.max_total_tokens
    fraction = config.mem_fraction_static
    budget = int((free + needs.weights) * fraction)
    left, page_bytes = budget - needs.total, token_bytes * page_size
    if stated is not None:
        num_pages = stated // page_size
        if num_pages < 1:
            raise ValueError(
                f"max_total_tokens must be at least page_size ({page_size}), got {stated}"
            )
        if rest := stated % page_size:
            log.warning(
                "max_total_tokens %d becomes %d: whole pages of %d tokens",
                stated,
                stated - rest,
                page_size,
            )
        if num_pages * page_bytes > left:
            raise ValueError(
                f"max_total_tokens {stated} needs {num_pages * page_bytes / 2**20:.0f} MiB of KV "
                f"memory, but mem_fraction_static {fraction} leaves {max(left, 0) / 2**20:.0f} MiB"
            )
    else:
        num_pages = left // page_bytes
        if modest:
            num_pages = min(num_pages, MODEST_TOKENS // page_size, MODEST_BYTES // page_bytes)
        if num_pages < 1:
            raise ValueError(
                f"no memory is left for KV: mem_fraction_static {fraction} gives "
                f"{budget / 2**20:.0f} MiB, of which {needs.total / 2**20:.0f} MiB are taken by "
                f"weights, buffers, workspace, logits and graphs; a page needs {page_bytes} bytes"
            )
    plan = MemoryPlan(needs, num_pages * page_bytes, num_pages, page_size, budget)
    log.info("%s", plan.table())
    if plan.num_tokens < max_context:
        log.warning(
            "the KV pool holds %d tokens, fewer than the context of %d: longer requests are "
            "refused or end early",
            plan.num_tokens,
            max_context,
        )
    return plan


def share_of_memory(comm: Communicator, device: Device, local_size: int) -> int:
    """The device's free memory once every rank has loaded. A CPU's is divided among them."""
    comm.all_reduce(torch.zeros(1, device=device.torch_device))
    shared = device.torch_device.type == "cpu"
    return device.free_memory() // (local_size if shared else 1)


def fewest(comm: Communicator, device: Device, count: int) -> int:
    """The least `count` of any rank."""
    counts = comm.gather(torch.tensor([count], device=device.torch_device))
    return int(comm.broadcast(counts.min()[None]).item())


def check_graphs(plan: MemoryPlan, taken: int) -> None:
    """Log what capturing took and what was planned; as a warning when it took more."""
    planned = plan.needs.graphs
    if taken > planned:
        log.warning(
            "graphs take %.0f MiB, more than the %.0f MiB planned: lower mem_fraction_static if "
            "memory runs out",
            taken / 2**20,
            planned / 2**20,
        )
    elif taken:
        log.info("graphs take %.0f MiB of the %.0f MiB planned", taken / 2**20, planned / 2**20)
