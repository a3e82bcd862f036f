"""`Worker`: what the steps of one rank need: device, memory, sizes and runner."""

from collections.abc import Callable

from minisgl.core.executor import Limits
from minisgl.device import Device
from minisgl.parallel import Communicator
from minisgl.step.draft import Draft
from minisgl.step.kv_pool import KVShape
from minisgl.step.rows import HostRows
from minisgl.step.runner import Model, Runner
from minisgl.step.sizes import Geometry, GraphSizes, draft_sizes, page_table_width


class Worker:
    """One rank. `runner`'s methods run in the device's stream; the rest belongs to the planner."""

    def __init__(
        self,
        device: Device,
        model: Model,
        shape: KVShape,
        limits: Limits,
        *,
        graphs: GraphSizes | None = None,
        comm: Communicator | None = None,
        draft: Draft | None = None,
        compare: bool = False,
    ) -> None:
        """Allocates what the runner needs; its arguments are this one's."""
        graphs, comm = graphs or GraphSizes({}), comm or Communicator()
        self.device = device
        self.limits = limits
        self.dtype = shape.dtype
        self.weight_bytes: int | None = None  # what a step reads of weights, where that is known
        self.compilations: Callable[[], int] = lambda: 0  # kernels compiled while serving
        self.geometry = Geometry(
            page_table_width(limits),
            limits.max_rows,
            device.row_multiple(shape.dtype),
            graphs.by_width,
            graphs.staging_words,
            page_size=limits.page_size,
            num_drafts=0 if draft is None else draft.num_drafts,
            draft_sizes=draft_sizes(limits.max_rows, any_size=not device.captures),
            piece_sizes=graphs.pieces,
        )
        self.host_rows = HostRows(limits.max_rows, limits.vocab_size)
        self.runner = device.run(
            Runner, device, model, shape, limits, self.geometry, graphs, comm, draft, compare
        )

    def close(self) -> None:
        """Idempotent."""
        self.device.close()
