"""Puts an engine together from a config: device, model, executor, scheduler, loop.

Everything people run comes through here, the spawned engine process included; nothing of the HTTP
stack is imported.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from minisgl.config import EngineConfig
from minisgl.core.costmodel import DEVICES, CostModel, DeviceFacts, ModelFacts
from minisgl.core.executor import Executor
from minisgl.core.ngram import NGramProposer
from minisgl.core.policy import SchedulerConfig
from minisgl.core.scheduler import Scheduler
from minisgl.core.speculation import Speculation
from minisgl.device import Device, pick_device
from minisgl.engine.engine import Engine
from minisgl.engine.messages import EngineInfo
from minisgl.log import get_logger
from minisgl.models.config import ModelConfig
from minisgl.models.hub import model_directory
from minisgl.runtime.executor import LocalExecutor, plan_on_one_thread
from minisgl.runtime.worker import load_worker

BUNDLED_MODEL = Path(__file__).parent / "assets" / "tiny"

log = get_logger(__name__)


@dataclass(frozen=True)
class _Built:
    executor: LocalExecutor
    facts: ModelConfig
    path: Path
    device: Device


def build_executor(config: EngineConfig) -> Executor:
    """The executor alone: the model loaded, its memory planned and allocated, kernels warm.

    Raises ValueError naming the field for what the config asks and cannot have.
    """
    return _build(config).executor


def build_engine(config: EngineConfig) -> Engine:
    """A ready engine. Call it on the thread that will own the engine."""
    built = _build(config)
    limits = built.executor.limits
    ngram = NGramProposer(config.speculative_ngram_min, config.speculative_ngram_max)
    speculation = None
    if config.speculative_algorithm == "ngram":
        speculation = Speculation(ngram, config.speculative_num_draft_tokens)
    scheduler = Scheduler(
        limits,
        SchedulerConfig(
            chunked_prefill_size=config.chunked_prefill_size,
            schedule_policy=config.schedule_policy,
            batch_policy=config.batch_policy,
            itl_target_ms=config.itl_target_ms,
            disable_radix_cache=config.disable_radix_cache,
        ),
        built.facts.eos_token_ids,
        CostModel(
            ModelFacts(**built.facts.cost_facts(built.executor.dtype)), _device_facts(built.device)
        ),
        speculation=speculation,
    )
    ngram.continuation = scheduler.continuation
    info = EngineInfo(
        model=config.model or "minisgl-tiny",
        model_path=str(built.path),
        architecture=built.facts.architecture,
        dtype=str(built.executor.dtype).removeprefix("torch."),
        device=built.device.name,
        eos_token_ids=list(built.facts.eos_token_ids),
        limits=limits,
    )
    return Engine(
        scheduler,
        built.executor,
        info,
        overlap=not config.disable_overlap_schedule,
        profile_dir=config.profile_dir,
    )


def _build(config: EngineConfig) -> _Built:
    if config.tp_size != 1:
        raise ValueError(
            f"tp_size must be 1, got {config.tp_size}: there is no tensor parallelism yet"
        )
    started = time.perf_counter()
    path = BUNDLED_MODEL
    if config.model is not None:
        path = model_directory(config.model, weights=config.load_format != "dummy")
    device = pick_device(config.device)
    try:
        _say_device(config, device)
        if device.torch_device.type == "cpu":
            plan_on_one_thread()
        worker, facts = load_worker(config, path, device)
    except BaseException:
        device.close()
        raise
    log.info("model %s is ready after %.1f s", path.name, time.perf_counter() - started)
    executor = LocalExecutor(worker, trace_details=config.profile_dir is not None)
    return _Built(executor, facts, path, device)


def _say_device(config: EngineConfig, device: Device) -> None:
    why = ""
    if config.device == "auto" and device.torch_device.type == "cpu":
        why = ": no CUDA device was found"
    log.info("running on %s%s", device.name, why)


def _device_facts(device: Device) -> DeviceFacts:
    """A known GPU's data sheet, else a middling one's: measured steps correct it."""
    if device.torch_device.type == "cpu":
        return DEVICES["cpu"]
    name = device.name.lower().replace(" ", "")
    known = sorted((key for key in DEVICES if key in name), key=len)  # "l40s" before "l4"
    return DEVICES[known[-1]] if known else DEVICES["a100"]
