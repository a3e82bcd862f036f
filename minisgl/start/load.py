"""Loading: from facts to a worker that is ready, in the order of `load_worker`."""

from pathlib import Path

from minisgl.core.executor import Limits
from minisgl.device import Device
from minisgl.device.meta import MetaDevice
from minisgl.kernels.attention import attention
from minisgl.kernels.op import Op
from minisgl.layers.weights import Placement
from minisgl.log import get_logger
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.models.loader import load_model
from minisgl.parallel import Communicator
from minisgl.start.facts import Facts
from minisgl.start.footprint import footprint
from minisgl.start.memory_plan import MemoryPlan, check_graphs, fewest, plan_memory, share_of_memory
from minisgl.start.startup import Kernels, Stages, make_ready
from minisgl.step.draft import Draft
from minisgl.step.fixed_order import FixedOrder
from minisgl.step.kv_pool import KVShape
from minisgl.step.worker import Worker

log = get_logger(__name__)


def load_worker(facts: Facts, device: Device, comm: Communicator | None = None) -> Worker:
    """Read the models, plan the memory, build kernels and the worker, and make it ready.

    Raises ValueError naming the field when the KV pool does not fit.
    """
    comm, stages, kernels, config = comm or Communicator(), Stages(), Kernels(device), facts.config
    model, draft = load_models(facts, device, comm, stages)
    shape = kv_shape(facts, model)
    with stages.stage("plan memory"):
        plan = device.run(_plan, facts, model, shape, draft, device, comm)
        limits = limits_of(facts, device.run(fewest, comm, device, plan.num_pages))
    with stages.stage("build kernels"):
        models = model, None if draft is None else draft.model
        forms = [[] if each is None else [b.forms() for b in each.blocks()] for each in models]
        kernels.build(facts, limits, comm, forms)
    # Nodes may log differently, but ranks take part in the same collectives or none.
    debugged = device.run(fewest, comm, device, int(config.log_level == "debug"))
    compare = bool(debugged) and comm.size > 1
    with stages.stage("warm up"):
        worker = make_worker(facts, model, draft, limits, device, comm, compare)
    if taken := make_ready(worker, facts, stages):
        check_graphs(plan, taken)
    kernels.ready()
    worker.compilations = kernels.missed
    worker.weight_bytes = model.read_bytes
    if comm.rank == 0:
        log.info("%s", stages.table())
    return worker


def make_worker(
    facts: Facts,
    model: Decoder,
    draft: Draft | None,
    limits: Limits,
    device: Device,
    comm: Communicator,
    compare: bool = False,
) -> Worker:
    """The worker that these models make, its buffers allocated."""
    return Worker(
        device,
        FixedOrder(model, device.torch_device) if facts.config.batch_invariant else model,
        kv_shape(facts, model),
        limits,
        graphs=facts.graphs,
        comm=comm,
        draft=draft,
        compare=compare,
    )


def limits_of(facts: Facts, num_pages: int) -> Limits:
    """What requests are checked against, with a pool of so many pages."""
    return Limits(
        num_pages=num_pages,
        page_size=facts.config.page_size,
        max_rows=facts.config.max_running_requests,
        max_context=facts.max_context,
        vocab_size=facts.model.vocab_size,
    )


def kv_shape(facts: Facts, model: Decoder) -> KVShape:
    """What a token of this rank's share of a model takes."""
    own = model.config
    return KVShape(own.num_layers, model.num_kv_heads, own.head_dim, facts.dtype)


def load_models(
    facts: Facts, device: Device, comm: Communicator, stages: Stages
) -> tuple[Decoder, Draft | None]:
    """This rank's share of the model, and the draft model where the config asks for one."""
    config = facts.config

    def load(model: ModelConfig, path: Path, comm: Communicator, op: Op) -> Decoder:
        files = None if config.load_format == "dummy" else path
        at = Placement(facts.dtype, device.torch_device, comm, op)
        return load_model(model, files, at, config.random_seed, facts.quantization)

    with stages.stage("load weights"):
        model = device.run(load, facts.model, facts.path, comm, facts.attention)
    if config.speculative_algorithm != "draft":
        return model, None
    if facts.draft is None:
        return model, Draft(None, None, config.num_draft_tokens)
    with stages.stage("load the draft model"):
        drafting = device.run(load, facts.draft.model, facts.draft.path, Communicator(), attention)
    return model, Draft(drafting, kv_shape(facts, drafting), config.num_draft_tokens)


def _plan(
    facts: Facts,
    model: Decoder,
    shape: KVShape,
    draft: Draft | None,
    device: Device,
    comm: Communicator,
) -> MemoryPlan:
    """The memory plan. Runs in the stream, once all ranks have loaded."""
    config = facts.config
    nowhere = MetaDevice(captures=device.captures)  # on which the same buffers take no memory
    make_worker(facts, model, draft, limits_of(facts, num_pages=0), nowhere, comm)
    needs = footprint(facts, model, draft, comm.size, nowhere.allocated, captures=device.captures)
    memory = share_of_memory(comm, device, config.tp_size // config.nnodes)
    token_bytes = shape.bytes_per_token
    if draft is not None and draft.shape is not None:
        token_bytes += draft.shape.bytes_per_token  # on the same pages
    modest = device.torch_device.type == "cpu"
    return plan_memory(memory, needs, token_bytes, config, facts.max_context, modest=modest)
