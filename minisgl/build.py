"""Puts an engine together from a config: device, model, executor, scheduler, loop.

Everything people run comes through here, the spawned engine process included; nothing of the HTTP
stack is imported.
"""

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from minisgl import csrc
from minisgl.config import EngineConfig
from minisgl.core.costmodel import DEVICES, CostModel, DevicePeaks, ModelSizes, cascade_min_tokens
from minisgl.core.draft_policy import DraftPolicy
from minisgl.core.grammar import GrammarBackend
from minisgl.core.ngram import NGramProposer
from minisgl.core.scheduler import Scheduler
from minisgl.core.speculation import Speculation, propose_on_device
from minisgl.device import Device, pick_device
from minisgl.engine.engine import Engine
from minisgl.engine.messages import EngineInfo
from minisgl.log import get_logger
from minisgl.models.hub import model_directory
from minisgl.ranks.executor import load_ranks
from minisgl.ranks.node import run_node
from minisgl.start.facts import Facts, read_facts
from minisgl.start.load import load_worker
from minisgl.start.sampling import read_sampling_defaults
from minisgl.step.executor import LocalExecutor, plan_on_one_thread

if TYPE_CHECKING:
    from minisgl.server.tokenizer import Tokenizer

BUNDLED_MODEL = Path(__file__).parent / "assets" / "tiny"

log = get_logger(__name__)


def build_engine(config: EngineConfig) -> Engine:
    """A ready engine: the model loaded, its memory planned and allocated, kernels warm.

    Call it on the thread that will own the engine. Raises ValueError naming the field for what the
    config asks and cannot have.
    """
    if config.node_rank != 0:
        raise ValueError(
            f"node_rank must be 0 where the engine is, got {config.node_rank}; "
            "`python -m minisgl.serve` runs the ranks of other nodes"
        )
    started = time.perf_counter()
    path = _model_path(config)
    csrc.use_level(config.cpu_level)
    device = pick_device(config.device, of=config.tp_size // config.nnodes)
    try:
        _log_device(config, device)
        if device.torch_device.type == "cpu":
            plan_on_one_thread()
        facts = read_facts(config, path, device)
        sampling = read_sampling_defaults(config, path)
        executor = _load(facts, device)
    except BaseException:
        device.close()
        raise
    log.info("model %s is ready after %.1f s", path.name, time.perf_counter() - started)
    info = EngineInfo(
        model=config.model or "minisgl-tiny",
        model_path=str(path),
        architecture=facts.model.architecture,
        dtype=str(facts.dtype).removeprefix("torch."),
        device=("" if config.tp_size == 1 else f"{config.tp_size} x ") + device.name,
        eos_token_ids=list(facts.model.eos_token_ids),
        limits=executor.limits,
        sampling_defaults=sampling,
    )
    overlap = not config.disable_overlap_schedule
    grammars = None
    try:
        grammars = _grammar_backend(config, info)
        scheduler = _scheduler(facts, device, executor)
        return Engine(
            scheduler,
            executor,
            info,
            overlap=overlap,
            grammar_backend=grammars,
            force_tokens=not config.disable_forced_tokens,
            profile_dir=config.profile_dir,
        )
    except BaseException:
        if grammars is not None:
            grammars.close()
        executor.close()
        raise


def run_ranks(config: EngineConfig) -> None:
    """On a node other than 0: run its ranks until node 0 stops them; errors as of `run_node`."""
    run_node(config, _model_path(config))


def _model_path(config: EngineConfig) -> Path:
    if config.model is None:
        return BUNDLED_MODEL
    return model_directory(config.model, weights=config.load_format != "dummy")


def _load(facts: Facts, device: Device) -> LocalExecutor:
    if facts.config.tp_size > 1:
        return load_ranks(facts, device)
    details = facts.config.profile_dir is not None
    return LocalExecutor(load_worker(facts, device), trace_details=details)


def _scheduler(facts: Facts, device: Device, executor: LocalExecutor) -> Scheduler:
    config, eos = facts.config, facts.model.eos_token_ids
    model = ModelSizes(**facts.model.cost_sizes(facts.dtype))
    if (held := executor.weight_bytes) is not None:  # codes take less than the dtype does
        model = msgspec.structs.replace(
            model, bytes_per_weight=config.tp_size * held / model.weights
        )
    own = _device_peaks(device, config.tp_size)
    cascade_min = config.cascade_min_shared_tokens
    if cascade_min is None and facts.cascade:
        cascade_min = cascade_min_tokens(model, own)
    ngram = NGramProposer(*config.ngram_sizes)
    speculation = None
    if config.speculative_algorithm != "none":
        on_device = config.speculative_algorithm == "draft"
        speculation = Speculation(
            propose_on_device if on_device else ngram,
            config.num_draft_tokens,
            on_device=on_device,
            policy=DraftPolicy(config.num_draft_tokens, any_width=not device.captures),
            chunk_size=config.chunked_prefill_size,
        )
    cost = CostModel(model, own)
    planned = replace(config, cascade_min_shared_tokens=cascade_min)
    scheduler = Scheduler(executor.limits, planned, eos, cost, speculation=speculation)
    ngram.continuation = scheduler.cache.continuation
    return scheduler


def _grammar_backend(config: EngineConfig, info: EngineInfo) -> GrammarBackend | None:
    """None where its library is missing, as on machines that only measure: forms are refused."""
    try:
        from minisgl.grammar.backend import LlgBackend
    except ModuleNotFoundError as error:
        log.warning("structured output is refused: %s", error)
        return None
    return LlgBackend(
        partial(read_tokenizer, Path(info.model_path)),
        info.limits.vocab_size,
        info.eos_token_ids,
        timeout=config.grammar_timeout,
        max_bytes=config.grammar_max_bytes,
        cache_bytes=config.grammar_cache_bytes,
    )


def read_tokenizer(model: Path) -> "Tokenizer":
    """That of a model's directory or GGUF file, as the server reads texts with it. ValueError where
    it is of another kind, which forms of texts cannot be compiled for."""
    if not (model.is_file() or (model / "tokenizer.json").is_file()):
        raise ValueError(f"structured_outputs needs a tokenizer.json, and {model} has none")
    from minisgl.server.tokenizer import Tokenizer  # its imports take time

    return Tokenizer.from_directory(model)


def _log_device(config: EngineConfig, device: Device) -> None:
    why = ""
    if config.device == "auto" and device.torch_device.type == "cpu":
        why = ": no CUDA device was found"
    log.info("running on %s%s", device.name, why)


def _device_peaks(device: Device, ranks: int) -> DevicePeaks:
    """A known GPU's data sheet, else an A100's, times `ranks`; measured steps correct it."""
    if device.torch_device.type == "cpu":
        return DEVICES["cpu"]
    name = device.name.lower().replace(" ", "")
    known = sorted((key for key in DEVICES if key in name), key=len)  # "l40s" before "l4"
    one = DEVICES[known[-1]] if known else DEVICES["a100"]
    return msgspec.structs.replace(one, flops=ranks * one.flops, bandwidth=ranks * one.bandwidth)
