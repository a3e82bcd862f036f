"""`Worker`: one rank's device, model, memory and runner, built and warmed up."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from minisgl.config import CUDA_GRAPH_MAX_BS, EngineConfig
from minisgl.core.executor import Limits
from minisgl.device import Device
from minisgl.kernels.shapes import EngineShapes
from minisgl.log import get_logger, shows_progress
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import ROPE_SLACK
from minisgl.models.loader import load_model
from minisgl.parallel import Communicator, Solo
from minisgl.runtime.agreement import fewest, share_of_memory
from minisgl.runtime.draft_loading import Draft, draft_launches, draft_sizes, load_draft
from minisgl.runtime.fixed_order import FixedOrder, check_fixed_order
from minisgl.runtime.footprint import GraphSizes, logits_bytes, workspace_bytes
from minisgl.runtime.graphs import DecodeGraphs, StaticBuffers
from minisgl.runtime.inputs import Geometry
from minisgl.runtime.kv_pool import KVPool, KVShape, check_graphs, plan_memory
from minisgl.runtime.piecewise import PiecewiseGraphs
from minisgl.runtime.rows import HostRows, RowBuffers
from minisgl.runtime.runner import Model, Runner
from minisgl.runtime.sampler import Sampler
from minisgl.runtime.startup import Kernels, Stages, capture_pieces, run_largest, warm_up

log = get_logger(__name__)

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
FP32_CPU_ROWS = 8  # CPU matrix products treat a row alike whatever others are there, in 8s


class Worker:
    """One rank. `runner`'s methods run in the device's stream; the rest belongs to the planner."""

    def __init__(
        self,
        device: Device,
        model: Model,
        shape: KVShape,
        limits: Limits,
        *,
        eos_token_ids: tuple[int, ...] = (),
        graphs: GraphSizes | None = None,
        comm: Communicator | None = None,
        stages: Stages | None = None,
        compiled: Callable[[], int] = lambda: 0,
        compare: bool = False,
        cascade: bool = False,
        draft: Draft | None = None,
        prompt_tokens: int = 0,
        num_drafts: int = 0,
    ) -> None:
        """Allocates the pool and the rows of `limits`, warms up and captures `graphs`.

        stages: where the time this takes is noted. compiled: how many kernels this process has
        compiled so far. compare: every step checks that all ranks of `comm` compute the same.
        cascade: whether steps may come with cascade groups, and are to be ready for. prompt_tokens:
        of a step, at most, beside rows with up to `num_drafts` drafts; on a GPU such a step is run
        last.
        """
        comm = comm or Solo()
        self.device = device
        self.limits = limits
        self.dtype = shape.dtype
        self.graph_bytes = 0  # what capturing took
        graphs, stages = graphs or GraphSizes({}), stages or Stages()
        on_cpu = not device.captures
        max_pages = _page_table_width(limits)
        passes = () if draft is None else draft_sizes(limits.max_rows, on_cpu)
        self.geometry = Geometry(
            max_pages,
            limits.max_rows,
            token_multiple(shape.dtype, on_cpu),
            graphs.by_width,
            graphs.staging_words,
            page_size=limits.page_size,
            num_drafts=draft.num_drafts if draft is not None else 0,
            draft_sizes=passes,
            piece_sizes=graphs.pieces,
        )
        self.host_rows = HostRows(limits.max_rows, limits.vocab_size, eos_token_ids)

        def build() -> Runner:
            with stages.stage("warm up"):
                pool = KVPool(device, shape, limits.num_pages, limits.page_size)
                rows = RowBuffers.allocate(device, limits.max_rows, max_pages, limits.vocab_size)
                drafting = None
                if draft is not None:
                    captures = bool(graphs.by_width)
                    drafting = draft.runner(device, limits, rows, comm, passes, graphs=captures)
                keeps_previous = draft is not None
                sampler = Sampler(device, model.logits, rows, comm, keeps_previous=keeps_previous)
                runner = Runner(
                    device,
                    model,
                    pool,
                    rows,
                    sampler,
                    draft=drafting,
                    compare=comm if compare else None,
                )
                warm_up(runner, limits, self.geometry, cascade=cascade, everything=not on_cpu)
            if not graphs.by_width:
                return runner
            free = device.memory().free
            if drafting is not None and not on_cpu:
                with stages.stage("capture the draft model"):
                    drafting.capture()
            buffers = StaticBuffers(device, limits.vocab_size, graphs)
            by_width = {
                width: DecodeGraphs(device, model.forward, sampler, pool, rows, buffers, own, width)
                for width, own in graphs.by_width.items()
            }
            sizes = graphs.pieces
            pieces = PiecewiseGraphs(device, model.forward, sizes) if sizes else None
            runner.use_graphs(by_width, buffers, pieces)
            if not on_cpu:  # where it costs nothing, graphs are made when they are first needed
                with stages.stage("capture graphs"):
                    for decode in by_width.values():
                        decode.capture(_progress, cascade=cascade)
                    for tokens in _progress(sizes[::-1]):
                        capture_pieces(runner, limits, self.geometry, tokens)
                self.graph_bytes = free - device.memory().free
            return runner

        self.runner = device.run(build)
        if prompt_tokens and not on_cpu:
            with stages.stage("largest step"):
                most = prompt_tokens, num_drafts
                device.run(run_largest, self.runner, limits, self.geometry, *most)
                device.record().wait()
        self._compiled, self._compiled_at_start = compiled, compiled()

    @property
    def compilations(self) -> int:
        """Kernels compiled since this was ready."""
        return self._compiled() - self._compiled_at_start

    def close(self) -> None:
        """Idempotent."""
        self.device.close()


def load_worker(
    config: EngineConfig, path: Path, device: Device, comm: Communicator | None = None
) -> tuple[Worker, ModelConfig]:
    """Read the model at `path` and its draft model, plan the memory and build the worker.

    Raises ValueError naming the field for a context or a pool that cannot be.
    """
    comm, stages, kernels = comm or Solo(), Stages(), Kernels(device)
    facts = ModelConfig.from_hf(path)
    on_cpu = not device.captures
    dtype = facts.dtype if config.dtype == "auto" else DTYPES[config.dtype]
    cascade = uses_cascade(config, facts, device)
    max_context = config.context_length or facts.max_context
    if max_context > facts.max_context:
        raise ValueError(
            f"context_length must be at most the model's {facts.max_context}, got {max_context}"
        )
    with stages.stage("load weights"):
        model = device.run(
            lambda: load_model(
                facts,
                path,
                dtype=dtype,
                device=device.torch_device,
                load_format=config.load_format,
                comm=comm,
                seed=config.random_seed,
            )
        )
    draft = None
    if config.speculative_algorithm == "draft":
        with stages.stage("load the draft model"):
            draft = load_draft(config, facts, path, max_context, dtype, device, comm)
    if config.batch_invariant:
        check_fixed_order(facts, dtype, device.torch_device)
    with stages.stage("plan memory"):
        weights = sum(w.target.numel() * w.target.element_size() for w in model.weights())
        shape = KVShape(facts.num_layers, model.num_kv_heads, facts.head_dim, dtype)
        max_rows, vocab = config.max_running_requests, facts.vocab_size
        num_drafts = config.num_draft_tokens
        graphs = _graph_sizes(config, dtype, on_cpu)
        graph_bytes = graphs.static_bytes(vocab) + graphs.pieces_bytes(facts, dtype, comm.size)
        if not on_cpu:
            graph_bytes += graphs.captured_bytes(facts, dtype, comm.size, cascade)
        most_tokens = config.chunked_prefill_size + max_rows * (1 + num_drafts)
        workspace = workspace_bytes(facts, most_tokens, dtype, comm.size)
        if draft is not None:  # which computes before the target, never beside it
            workspace = max(workspace, draft.workspace(most_tokens))
            captures = bool(graphs.by_width) and not on_cpu
            graph_bytes += draft.graph_bytes(draft_sizes(max_rows, on_cpu), captures=captures)
        plan = plan_memory(
            device.run(share_of_memory, comm, device, config.tp_size // config.nnodes),
            shape,
            on_cpu=on_cpu,
            draft_shape=None if draft is None else draft.shape,
            weights=weights + (0 if draft is None else draft.weights),
            workspace=workspace,
            logits=logits_bytes(vocab, max_rows * (1 + num_drafts)),
            counts=RowBuffers.counts_bytes(max_rows, vocab),
            graphs=graph_bytes,
            page_size=config.page_size,
            max_context=max_context,
            mem_fraction_static=config.mem_fraction_static,
            max_total_tokens=config.max_total_tokens,
        )
    limits = Limits(
        num_pages=device.run(fewest, comm, device, plan.num_pages),
        page_size=plan.page_size,
        max_rows=max_rows,
        max_context=max_context,
        vocab_size=vocab,
    )
    # Nodes may log differently, but ranks take part in the same collectives or none.
    debugged = int(config.log_level == "debug")
    compare = bool(device.run(fewest, comm, device, debugged)) and comm.size > 1
    with stages.stage("build kernels"):
        launched = EngineShapes(
            page_size=limits.page_size,
            num_pages=limits.num_pages,
            max_pages=_page_table_width(limits),
            max_rows=max_rows,
            max_drafts=num_drafts,
            batch_invariant=config.batch_invariant,
            cascade=cascade,
        )
        kernels.build(model, launched, comm)
        if draft is not None and draft.model is not None:
            kernels.build(draft.model, draft_launches(launched), Solo())
    worker = Worker(
        device,
        FixedOrder(model, device.torch_device) if config.batch_invariant else model,
        shape,
        limits,
        eos_token_ids=facts.eos_token_ids,
        graphs=graphs,
        comm=comm,
        stages=stages,
        compiled=kernels.compiled,
        compare=compare,
        cascade=cascade,
        draft=draft,
        prompt_tokens=config.chunked_prefill_size,
        num_drafts=num_drafts,
    )
    check_graphs(plan, worker.graph_bytes)
    if comm.rank == 0:
        log.info("%s", stages.table())
    return worker, facts


def uses_cascade(config: EngineConfig, facts: ModelConfig, device: Device) -> bool:
    """Whether steps have cascade groups: on GPUs, and on CPUs, where they do not pay, on demand.

    Raises ValueError where they are demanded of a model that has no use for them.
    """
    least = config.cascade_min_shared_tokens
    if all(layer.window is not None for layer in facts.layers):
        if least is not None:
            raise ValueError(
                f"cascade_min_shared_tokens must be absent for {config.model}, got {least}: every "
                "layer has a sliding window, which leaves shared prefixes out"
            )
        return False
    if config.disable_cascade or config.disable_radix_cache or config.batch_invariant:
        return False
    return least is not None or device.torch_device.type != "cpu"


def _page_table_width(limits: Limits) -> int:
    return -(-(limits.max_context + ROPE_SLACK) // limits.page_size)


def token_multiple(dtype: torch.dtype, on_cpu: bool) -> int:
    """Steps have half as many tokens, or a multiple of it; 1 = any number."""
    return FP32_CPU_ROWS if on_cpu and dtype == torch.float32 else 1


def _graph_sizes(config: EngineConfig, dtype: torch.dtype, on_cpu: bool) -> GraphSizes:
    """With drafts, graphs for one token and for all drafts there may be: what has fewer is padded,
    but on a CPU, where every width is at hand."""
    if config.disable_cuda_graph:
        return GraphSizes({})
    most = min(config.max_running_requests, config.cuda_graph_max_bs or CUDA_GRAPH_MAX_BS)
    widths: Sequence[int] = (1,)
    if config.num_draft_tokens:
        longest = 1 + config.num_draft_tokens
        widths = range(1, longest + 1) if on_cpu else (1, longest)
    steps = config.chunked_prefill_size + config.max_running_requests * widths[-1]
    in_pieces = min(steps, config.piecewise_cuda_graph_max_tokens or 0)
    return GraphSizes.of(most, widths, on_cpu, token_multiple(dtype, on_cpu), in_pieces)


def _progress(sizes: Sequence[int]) -> Iterable[int]:
    hidden = not shows_progress()
    bar: Iterable[int] = tqdm(
        sizes, desc="capturing graphs", unit="size", leave=False, disable=hidden
    )
    return bar
