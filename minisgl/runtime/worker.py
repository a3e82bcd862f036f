"""`Worker`: one rank's device, model, memory and runner, built and warmed up."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from minisgl.config import CUDA_GRAPH_MAX_BS, EngineConfig
from minisgl.core.batch import Batch, Chunk, RowSetup
from minisgl.core.executor import Limits
from minisgl.core.request import SamplingParams
from minisgl.device import Device
from minisgl.log import get_logger, shows_progress
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import ROPE_SLACK
from minisgl.models.loader import load_model
from minisgl.parallel import Communicator, Solo, share
from minisgl.runtime.fixed_order import FixedOrder, check_fixed_order
from minisgl.runtime.graphs import DecodeGraphs, StaticBuffers, padded_sizes
from minisgl.runtime.inputs import Geometry, pack_step
from minisgl.runtime.kv_pool import KVPool, KVShape, MemoryPlan, plan_memory
from minisgl.runtime.rows import HostRows, RowBuffers
from minisgl.runtime.runner import Model, Runner, Step
from minisgl.runtime.sampler import Sampler

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
        graphs: bool = True,
        comm: Communicator | None = None,
        graph_max_sequences: int = CUDA_GRAPH_MAX_BS,
        graph_widths: Sequence[int] = (1,),
    ) -> None:
        """Allocates the pool and the rows of `limits`, warms up and captures decode graphs.

        graph_widths: the tokens per sequence, 1 + drafts, for which there are graphs.
        """
        self.device = device
        self.limits = limits
        self.dtype = shape.dtype
        dtype, on_cpu = shape.dtype, device.torch_device.type == "cpu"
        multiple = FP32_CPU_ROWS if on_cpu and dtype == torch.float32 else 1
        most = min(limits.max_rows, graph_max_sequences)
        decode_sizes = {}
        if graphs:
            decode_sizes = {width: _sizes(most, width, on_cpu, multiple) for width in graph_widths}
        max_pages = -(-(limits.max_context + ROPE_SLACK) // limits.page_size)
        staging = StaticBuffers.staging_words(decode_sizes) if graphs else 0
        self.geometry = Geometry(max_pages, limits.max_rows, multiple, decode_sizes, staging)
        self.host_rows = HostRows(limits.max_rows, limits.vocab_size, eos_token_ids)

        def build() -> Runner:
            pool = KVPool(device, shape, limits.num_pages, limits.page_size)
            rows = RowBuffers.allocate(device, limits.max_rows, max_pages, limits.vocab_size)
            sampler = Sampler(device, model.logits, rows, comm or Solo())
            self._warm_up(Runner(device, model, pool, rows, sampler))
            if not graphs:
                return Runner(device, model, pool, rows, sampler)
            buffers = StaticBuffers(device, rows, decode_sizes)
            by_width = {
                width: DecodeGraphs(
                    device, model.forward, sampler, pool, rows, buffers, sizes, width
                )
                for width, sizes in decode_sizes.items()
            }
            if not on_cpu:
                for decode in by_width.values():
                    decode.capture(_progress)
            return Runner(device, model, pool, rows, sampler, by_width, buffers)

        self.runner = device.run(build)

    def _warm_up(self, runner: Runner) -> None:
        """Run a prompt chunk and a mixed step on the padding row, so that kernels are ready."""
        row, page = self.limits.max_rows, [0]
        host = HostRows(self.limits.max_rows, self.limits.vocab_size, ())
        params = SamplingParams(seed=0, temperature=0.0)  # padding is sampled at the least cost
        setup = RowSetup(0, 0, row, 0, 1, params, [])
        prompt = Chunk(0, 0, row, 0, 1, [0], 0, page, True)
        decode = Chunk(0, 0, row, 1 % self.limits.page_size, 1, [], 0, [], True)
        eager = Geometry(self.geometry.page_table_width, row, self.geometry.token_multiple)
        for batch in (Batch(0, [prompt], 0, [setup]), Batch(1, [decode, prompt], 1)):
            step = Step(pack_step(batch, host, eager))
            runner.forward(step)
            runner.sample(step, None)

    def close(self) -> None:
        """Idempotent."""
        self.device.close()


def load_worker(
    config: EngineConfig, path: Path, device: Device, comm: Communicator | None = None
) -> tuple[Worker, ModelConfig]:
    """Read the model at `path`, plan the memory and build the worker.

    Raises ValueError naming the field for a context or a pool that cannot be.
    """
    comm = comm or Solo()
    facts = ModelConfig.from_hf(path)
    on_cpu = device.torch_device.type == "cpu"
    dtype = facts.dtype if config.dtype == "auto" else DTYPES[config.dtype]
    max_context = config.context_length or facts.max_context
    if max_context > facts.max_context:
        raise ValueError(
            f"context_length must be at most the model's {facts.max_context}, got {max_context}"
        )
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
    if config.batch_invariant:
        check_fixed_order(facts, dtype, device.torch_device)
    weights = sum(w.target.numel() * w.target.element_size() for w in model.weights())
    kv_heads = share("num_key_value_heads", facts.num_kv_heads, comm)[1]
    shape = KVShape(facts.num_layers, kv_heads, facts.head_dim, dtype)
    plan = plan_memory(
        device.memory(),
        shape,
        on_cpu=on_cpu,
        weights=weights,
        workspace=_workspace_bytes(
            facts, config.chunked_prefill_size + config.max_running_requests, dtype, comm.size
        ),
        logits=_logits_bytes(facts.vocab_size, config.max_running_requests),
        counts=RowBuffers.counts_bytes(config.max_running_requests, facts.vocab_size),
        page_size=config.page_size,
        max_context=max_context,
        mem_fraction_static=config.mem_fraction_static,
        max_total_tokens=config.max_total_tokens,
    )
    worker = Worker(
        device,
        FixedOrder(model, device.torch_device) if config.batch_invariant else model,
        shape,
        _limits(config, plan, max_context, facts.vocab_size),
        eos_token_ids=facts.eos_token_ids,
        graphs=not config.disable_cuda_graph,
        comm=comm,
        graph_max_sequences=config.cuda_graph_max_bs or CUDA_GRAPH_MAX_BS,
    )
    return worker, facts


def _limits(config: EngineConfig, plan: MemoryPlan, max_context: int, vocab: int) -> Limits:
    return Limits(
        num_pages=plan.num_pages,
        page_size=plan.page_size,
        max_rows=config.max_running_requests,
        max_context=max_context,
        vocab_size=vocab,
    )


def _workspace_bytes(facts: ModelConfig, tokens: int, dtype: torch.dtype, ranks: int) -> int:
    """Activations that live at once in one layer: residual, normed, qkv and attention, gate-up."""
    heads = (2 * facts.num_heads + 2 * facts.num_kv_heads) * facts.head_dim
    inner = max(
        facts.inner_size,
        *((layer.moe.inner_size * layer.moe.top_k) if layer.moe else 0 for layer in facts.layers),
    )
    per_token = 4 * facts.hidden_size + (heads + 3 * inner) // ranks
    return tokens * per_token * dtype.itemsize


def _logits_bytes(vocab: int, rows: int) -> int:
    """Logits in fp32 and three temporaries of the sampler of that size."""
    return 4 * rows * vocab * 4


def _sizes(most: int, width: int, on_cpu: bool, multiple: int) -> tuple[int, ...]:
    """Numbers of sequences with a decode graph of `width`, up to at least `most`.

    A CPU needs no padding, where any size replays at once, but that to `multiple`.
    """
    if multiple == 1:
        return tuple(range(1, most + 1)) if on_cpu else padded_sizes(most)
    step, half = multiple // math.gcd(multiple, width), multiple // 2
    sizes = range(step, most + step, step)
    if half % width:
        return tuple(sizes)
    return (half // width, *(size for size in sizes if half // width < most))


def _progress(sizes: Sequence[int]) -> Iterable[int]:
    hidden = not shows_progress()
    bar: Iterable[int] = tqdm(
        sizes, desc="capturing graphs", unit="size", leave=False, disable=hidden
    )
    return bar
