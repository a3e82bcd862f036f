"""`Worker`: what the steps of one rank need: device, memory, sizes and runner."""

from collections.abc import Callable

from minisgl.core.executor import Limits
from minisgl.device import Device
from minisgl.parallel import Communicator
from minisgl.step.draft import Draft, DraftRunner
from minisgl.step.graphs import DecodeGraphs, StaticBuffers
from minisgl.step.kv_pool import KVPool, KVShape
from minisgl.step.piecewise import PiecewiseGraphs
from minisgl.step.rows import HostRows, RowBuffers
from minisgl.step.runner import Model, Runner
from minisgl.step.sampler import Sampler
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
        """Allocates the pool and the rows of `limits`, and what all `graphs` share.

        compare: every step checks that all ranks of `comm` compute the same.
        """
        graphs = graphs or GraphSizes({})
        self.device = device
        self.limits = limits
        self.dtype = shape.dtype
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
            self._build, model, shape, graphs, comm or Communicator(), draft, compare
        )

    def _build(
        self,
        model: Model,
        shape: KVShape,
        graphs: GraphSizes,
        comm: Communicator,
        draft: Draft | None,
        compare: bool,
    ) -> Runner:
        """In the stream."""
        device, limits, vocab = self.device, self.limits, self.limits.vocab_size
        pool = KVPool(device, shape, limits.num_pages, limits.page_size)
        pages = self.geometry.page_table_width
        rows = RowBuffers(device, limits.max_rows, pages, vocab)
        drafting = None
        if draft is not None:
            sizes, some = self.geometry.draft_sizes, bool(graphs.by_width)
            drafting = DraftRunner(device, draft, limits, rows, comm, sizes, graphs=some)
        sampler = Sampler(device, model.logits, rows, comm, keeps_previous=draft is not None)
        buffers = StaticBuffers(device, vocab, graphs)
        return Runner(
            device,
            model,
            pool,
            rows,
            sampler,
            graphs={
                width: DecodeGraphs(device, model.forward, sampler, pool, rows, buffers, own, width)
                for width, own in graphs.by_width.items()
            },
            staging=buffers.staging,
            pieces=PiecewiseGraphs(device, model.forward, graphs.pieces),
            draft=drafting,
            compare=comm if compare else None,
        )

    def close(self) -> None:
        """Idempotent."""
        self.device.close()
