"""Loading: a config and a model on disk become a worker that is ready."""

from collections.abc import Sequence
from pathlib import Path

import torch

from minisgl.config import CUDA_GRAPH_MAX_BS, EngineConfig
from minisgl.core.executor import Limits
from minisgl.device import Device
from minisgl.kernels.shapes import EngineShapes
from minisgl.log import get_logger
from minisgl.models.config import ModelConfig
from minisgl.models.loader import load_model
from minisgl.parallel import Communicator, Solo
from minisgl.start.draft_loading import draft_launches, load_draft
from minisgl.start.footprint import (
    captured_bytes,
    draft_graph_bytes,
    draft_workspace_bytes,
    logits_bytes,
    pieces_bytes,
    static_bytes,
    weight_bytes,
    workspace_bytes,
)
from minisgl.start.memory_plan import check_graphs, plan_memory
from minisgl.start.startup import Kernels, Stages, make_ready
from minisgl.step.agreement import fewest, share_of_memory
from minisgl.step.fixed_order import FixedOrder, check_fixed_order
from minisgl.step.kv_pool import KVShape
from minisgl.step.rows import RowBuffers
from minisgl.step.sizes import GraphSizes, draft_sizes, page_table_width, token_multiple
from minisgl.step.worker import Worker

log = get_logger(__name__)

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


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
        weights = weight_bytes(model)
        shape = KVShape(facts.num_layers, model.num_kv_heads, facts.head_dim, dtype)
        max_rows, vocab = config.max_running_requests, facts.vocab_size
        num_drafts = config.num_draft_tokens
        graphs = graph_sizes(config, dtype, on_cpu)
        graph_bytes = static_bytes(graphs, vocab) + pieces_bytes(graphs, facts, dtype, comm.size)
        if not on_cpu:
            graph_bytes += captured_bytes(graphs, facts, dtype, comm.size, cascade)
        most_tokens = config.chunked_prefill_size + max_rows * (1 + num_drafts)
        workspace = workspace_bytes(facts, most_tokens, dtype, comm.size)
        if draft is not None:  # which computes before the target, never beside it
            weights += 0 if draft.model is None else weight_bytes(draft.model)
            workspace = max(workspace, draft_workspace_bytes(draft, most_tokens))
            captures = bool(graphs.by_width) and not on_cpu
            passes = draft_sizes(max_rows, on_cpu)
            graph_bytes += draft_graph_bytes(draft, passes, captures=captures)
        plan = plan_memory(
            device.run(share_of_memory, comm, device, config.tp_size // config.nnodes),
            shape,
            on_cpu=on_cpu,
            draft_shape=None if draft is None else draft.shape,
            weights=weights,
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
            max_pages=page_table_width(limits),
            max_rows=max_rows,
            max_drafts=num_drafts,
            batch_invariant=config.batch_invariant,
            cascade=cascade,
        )
        kernels.build(model, launched, comm)
        if draft is not None and draft.model is not None:
            kernels.build(draft.model, draft_launches(launched), Solo())
    with stages.stage("warm up"):
        worker = Worker(
            device,
            FixedOrder(model, device.torch_device) if config.batch_invariant else model,
            shape,
            limits,
            eos_token_ids=facts.eos_token_ids,
            graphs=graphs,
            comm=comm,
            draft=draft,
            compare=compare,
        )
    prompt_tokens = config.chunked_prefill_size
    taken = make_ready(
        worker, stages, cascade=cascade, prompt_tokens=prompt_tokens, num_drafts=num_drafts
    )
    if taken:
        check_graphs(plan, taken + static_bytes(graphs, vocab))
    worker.compilations = kernels.missing
    kernels.ready()
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


def graph_sizes(config: EngineConfig, dtype: torch.dtype, on_cpu: bool) -> GraphSizes:
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
