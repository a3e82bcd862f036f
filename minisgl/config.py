"""The one configuration of the engine and its server; command-line flags are generated from it."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args


def _option(default: Any, help: str, *, aliases: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "aliases": aliases})


DType = Literal["auto", "bfloat16", "float16", "float32"]
LoadFormat = Literal["auto", "dummy"]
SchedulePolicy = Literal["fcfs", "lpm", "priority"]
BatchPolicy = Literal["balanced", "prefill-first", "decode-first"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that shapes the engine. Field names are the flags with underscores."""

    model: str | None = _option(
        None, "HF directory or hub id; the bundled model when absent", aliases=("--model-path",)
    )
    dtype: DType = _option("auto", "weights and activations; auto follows the checkpoint")
    device: str = _option("auto", "cuda, cpu, or auto: cuda when there is one")
    load_format: LoadFormat = _option("auto", "auto reads safetensors, dummy fills random weights")
    tp_size: int = _option(1, "tensor-parallel ranks", aliases=("--tp",))
    page_size: int = _option(16, "tokens per KV page: 1, 16, 32 or 64")
    mem_fraction_static: float = _option(0.9, "share of free device memory for weights and KV")
    max_total_tokens: int | None = _option(None, "KV pool size in tokens; measured when absent")
    max_running_requests: int = _option(256, "sequences running at once")
    chunked_prefill_size: int = _option(2048, "tokens computed per step, decode included")
    schedule_policy: SchedulePolicy = _option("fcfs", "order of the waiting queue")
    batch_policy: BatchPolicy = _option("balanced", "balance of prefill against decode in a step")
    itl_target_ms: float | None = _option(None, "inter-token latency the balanced policy holds")
    disable_radix_cache: bool = _option(False, "share no prefixes between requests")
    disable_overlap_schedule: bool = _option(False, "plan a step only after the last is collected")
    disable_cuda_graph: bool = _option(False, "run every step eagerly")
    context_length: int | None = _option(None, "longest sequence; the model's own when absent")
    random_seed: int = _option(0, "seed of dummy weights")
    log_level: str = _option("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        for item in fields(self):
            choices = get_args(item.type) if "Literal" in str(item.type) else ()
            value = getattr(self, item.name)
            if choices and value not in choices:
                raise ValueError(f"{item.name} must be one of {list(choices)}, got {value!r}")
        if self.page_size not in (1, 16, 32, 64):
            raise ValueError(f"page_size must be one of [1, 16, 32, 64], got {self.page_size}")
        for name in ("tp_size", "max_running_requests", "chunked_prefill_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_total_tokens", "context_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0.0 < self.mem_fraction_static <= 1.0:
            raise ValueError(
                "mem_fraction_static must be greater than 0 and at most 1, "
                f"got {self.mem_fraction_static}"
            )
        if self.itl_target_ms is not None and self.itl_target_ms <= 0:
            raise ValueError(f"itl_target_ms must be greater than 0, got {self.itl_target_ms}")


@dataclass(frozen=True, kw_only=True)
class ServerConfig(EngineConfig):
    """The engine's configuration and where it is served."""

    host: str = _option("127.0.0.1", "address to listen on")
    port: int = _option(30000, "TCP port to listen on")
    served_model_name: str | None = _option(None, "name in /v1/models; the model's when absent")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port must be between 0 and 65535, got {self.port}")
