"""The one configuration of the engine and its server; command-line flags are generated from it."""

import math
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, Literal, get_args, get_origin


def _option(
    default: Any,
    help: str,
    *,
    aliases: tuple[str, ...] = (),
    least: int | None = 1,
    most: int | None = None,
) -> Any:
    """A field and its flag. A number is at least `least`, or above 0 where that is None."""
    limits = {"least": least, "most": most}
    return field(default=default, metadata={"help": help, "aliases": aliases, **limits})


DType = Literal["auto", "bfloat16", "float16", "float32"]
Bits = Literal["auto", "none", "int8", "int4"]
LoadFormat = Literal["auto", "dummy"]
Activations = Literal["auto", "int8", "none"]
SchedulePolicy = Literal["fcfs", "lpm", "priority"]
LogLevel = Literal["debug", "info", "warning", "error"]
BatchPolicy = Literal["balanced", "prefill-first", "decode-first"]
SamplingSource = Literal["model", "openai"]
CpuLevel = Literal["auto", "avx512_bf16", "avx512", "avx2", "portable"]
AttentionBackend = Literal["auto", "triton", "gluon"]
SpeculativeAlgorithm = Literal["none", "draft", "ngram"]
ToolCallParser = Literal[
    "auto", "none", "qwen3_coder", "hermes", "mistral", "pythonic", "llama3_json"
]
ReasoningParser = Literal["auto", "none", "think", "mistral", "cohere", "seed"]
PAGE_SIZES = (1, 16, 32, 64)
GROUPS = (32, 64, 128)
CUDA_GRAPH_MAX_BS = 256  # beyond, a step's kernels take longer than launching them
MAX_DRAFT_TOKENS = 16
MAX_GRAMMAR_BYTES = 2**20  # of `SamplingParams.structured_outputs` as JSON


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything that shapes the engine. Field names are the flags with underscores."""

    model: str | None = _option(
        None,
        "HF directory, GGUF file, hub id or smollm2; the bundled model when absent",
        aliases=("--model-path",),
    )
    chat_template: str | None = _option(
        None, "file of a chat template in Jinja; the model's own when absent"
    )
    dtype: DType = _option("auto", "weights and activations; auto follows the checkpoint")
    quantization: Bits = _option(
        "none", "none makes floats of all weights, auto leaves them as stored, int8 and int4 round"
    )
    quantization_head: Bits = _option(
        "auto", "that of the embedding and the head; auto: as the others, but int8 beside int4"
    )
    quantization_group: int | None = _option(
        None, "inputs of rounded weights that share a scale: 32, 64 or 128; 32 when absent"
    )
    quantized_activations: Activations = _option(
        "auto", "what quantised weights are multiplied with; auto: int8 on a CPU in bfloat16"
    )
    device: str = _option("auto", "cuda, cpu, or auto: cuda when there is one")
    cpu_level: CpuLevel = _option(
        "auto", "instructions that native CPU code may use; auto: the best that the CPU has"
    )
    load_format: LoadFormat = _option("auto", "auto reads the files, dummy fills random weights")
    tp_size: int = _option(1, "tensor-parallel ranks", aliases=("--tp",))
    nnodes: int = _option(1, "machines that share the ranks equally")
    node_rank: int = _option(0, "which of them this is; 0 serves, the others run theirs", least=0)
    dist_init_addr: str | None = _option(None, "host:port of node 0, where the nodes meet")
    page_size: int = _option(16, "tokens per KV page: 1, 16, 32 or 64")
    mem_fraction_static: float = _option(
        0.9, "share of free device memory for weights and KV", least=None, most=1
    )
    max_total_tokens: int | None = _option(None, "KV pool size in tokens; measured when absent")
    max_running_requests: int = _option(256, "sequences running at once")
    chunked_prefill_size: int = _option(2048, "prompt tokens computed per step, at most")
    schedule_policy: SchedulePolicy = _option(
        "fcfs", "who is served first; with priority, the higher also take the place of the lower"
    )
    batch_policy: BatchPolicy = _option(
        "balanced", "prompt tokens beside decode: by cost, all there are, or what decode leaves"
    )
    itl_target_ms: float | None = _option(
        None,
        "inter-token latency that balanced holds, but not below 1.5 times that of one stream",
        least=None,
    )
    disable_radix_cache: bool = _option(False, "share no prefixes between requests")
    disable_cascade: bool = _option(False, "read shared prefixes once per sequence when decoding")
    cascade_min_shared_tokens: int | None = _option(
        None, "tokens a group's shared prefix must save each step; by the device when absent"
    )
    attention_backend: AttentionBackend = _option(
        "auto", "GPU kernel of prompt attention: triton, gluon (sm_90 only), or auto: triton"
    )
    disable_overlap_schedule: bool = _option(False, "plan a step only after the last is collected")
    batch_invariant: bool = _option(
        False, "compute in fixed orders: a request's tokens do not depend on its batch"
    )
    disable_cuda_graph: bool = _option(False, "run every step eagerly")
    cuda_graph_max_bs: int | None = _option(
        None, f"largest decode batch with a CUDA graph; {CUDA_GRAPH_MAX_BS} when absent"
    )
    piecewise_cuda_graph_max_tokens: int | None = _option(
        None, "most tokens of other steps captured in pieces around attention; none when absent"
    )
    context_length: int | None = _option(None, "longest sequence; the model's own when absent")
    speculative_algorithm: SpeculativeAlgorithm = _option(
        "none", "how drafts are proposed: by a draft model, by ngram lookup, or not at all"
    )
    speculative_draft_model: str | None = _option(
        None, "HF directory or hub id of the draft model; tiny-draft is the bundled model's"
    )
    speculative_num_draft_tokens: int | None = _option(
        None, "tokens drafted before a verification, at most; 4 when absent", most=MAX_DRAFT_TOKENS
    )
    speculative_ngram_min: int | None = _option(
        None, "shortest run of tokens that ngram looks up; 2 when absent"
    )
    speculative_ngram_max: int | None = _option(
        None, "longest run of tokens that ngram looks up; 4 when absent, or the shortest"
    )
    sampling_defaults: SamplingSource = _option(
        "model", "what a request leaves open: as its generation_config.json recommends, or OpenAI's"
    )
    grammar_timeout: float = _option(
        10.0, "seconds that a schema or grammar may take to compile", least=None
    )
    grammar_max_bytes: int = _option(
        2**17, "bytes of a schema or grammar as JSON, at most", most=MAX_GRAMMAR_BYTES
    )
    grammar_cache_bytes: int = _option(2**28, "bytes of compiled grammars that are kept")
    disable_forced_tokens: bool = _option(
        False, "draw tokens that a schema or grammar leaves no choice about, one in a step"
    )
    random_seed: int = _option(0, "seed of dummy weights", least=0)
    profile_dir: str | None = _option(None, "folder of profiler traces; start and stop by request")
    log_level: LogLevel = _option("info", "what is logged to stderr")

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            _check_type(item.name, item.type, value)
            if type(value) in (int, float):
                _check_range(item.name, value, item.metadata["least"], item.metadata["most"])
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"page_size must be one of {list(PAGE_SIZES)}, got {self.page_size}")
        if self.device not in ("auto", "cpu", "cuda") and not self.device.startswith("cuda:"):
            raise ValueError(f"device must be auto, cpu, cuda or cuda:<index>, got {self.device!r}")
        _check_quantization(self)
        _check_nodes(self)
        if self.profile_dir == "":
            raise ValueError("profile_dir must name a folder, got ''")
        if self.itl_target_ms is not None and self.batch_policy != "balanced":
            raise ValueError(f"itl_target_ms needs batch_policy balanced, got {self.batch_policy}")
        if self.schedule_policy == "lpm" and self.disable_radix_cache:
            raise ValueError("schedule_policy lpm needs the radix cache, got disable_radix_cache")
        for name in ("cuda_graph_max_bs", "piecewise_cuda_graph_max_tokens"):
            if self.disable_cuda_graph and getattr(self, name) is not None:
                raise ValueError(f"{name} needs CUDA graphs, got disable_cuda_graph")
        if self.cascade_min_shared_tokens is not None:
            for name in ("disable_cascade", "disable_radix_cache", "batch_invariant"):
                if getattr(self, name):
                    raise ValueError(f"cascade_min_shared_tokens needs cascade groups, got {name}")
        if self.attention_backend == "gluon" and self.batch_invariant:
            raise ValueError("attention_backend gluon cannot be used with batch_invariant")
        _check_speculation(self)

    @property
    def keeps_codes(self) -> bool:
        """Whether any weight may be in codes of 4 or 8 bits."""
        return self.quantization != "none" or self.quantization_head in ("int8", "int4")

    @property
    def num_draft_tokens(self) -> int:
        """Drafts of a sequence in a step, at most; 0 without speculation."""
        if self.speculative_algorithm == "none":
            return 0
        return self.speculative_num_draft_tokens or 4

    @property
    def ngram_sizes(self) -> tuple[int, int]:
        """The shortest and the longest run of tokens that ngram looks up."""
        shortest = self.speculative_ngram_min or 2
        return shortest, self.speculative_ngram_max or max(4, shortest)


@dataclass(frozen=True, kw_only=True)
class ServerConfig(EngineConfig):
    """The engine's configuration and where it is served."""

    host: str = _option("127.0.0.1", "address to listen on")
    port: int = _option(30000, "TCP port to listen on", least=0, most=65535)
    served_model_name: str | None = _option(None, "name in /v1/models; the model's when absent")
    tool_call_parser: ToolCallParser = _option(
        "auto", "how the model writes tool calls; auto is what its chat template shows"
    )
    reasoning_parser: ReasoningParser = _option(
        "auto", "which marks stand around reasoning; auto is what the chat template shows"
    )
    watchdog_timeout: float = _option(
        60.0, "seconds a step may take before /health says 503", least=None
    )
    drain_timeout: float = _option(30.0, "seconds a shutdown waits for running requests", least=0)


def _check_type(name: str, annotation: Any, value: object) -> None:
    """Raises TypeError or ValueError when `value` is not of the annotated kind."""
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        if value not in choices:
            raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")
        return
    allowed = get_args(annotation) or (annotation,)
    if type(value) in allowed or (float in allowed and type(value) is int):
        if value == math.inf:
            raise ValueError(f"{name} must be finite, got {value}")
        return
    kinds = " or ".join("None" if kind is NoneType else kind.__name__ for kind in allowed)
    raise TypeError(f"{name} must be {kinds}, got {value!r} ({type(value).__name__})")


def _check_range(name: str, value: float, least: int | None, most: int | None) -> None:
    if least is None and not value > 0:
        raise ValueError(f"{name} must be greater than 0, got {value}")
    if least is not None and not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def _check_quantization(config: EngineConfig) -> None:
    asked = config.quantization, config.quantization_head
    given = f"got {asked[0]!r} and {asked[1]!r}"
    group = config.quantization_group
    if group is not None and not {*asked} & {"int8", "int4"}:
        raise ValueError(
            f"quantization_group needs quantization or quantization_head int8 or int4, {given}"
        )
    if group not in (None, *GROUPS):
        raise ValueError(f"quantization_group must be one of {list(GROUPS)}, got {group}")
    if config.quantized_activations == "int8" and not config.keeps_codes:
        raise ValueError(
            f"quantized_activations int8 needs quantization or quantization_head, {given}"
        )


def _check_speculation(config: EngineConfig) -> None:
    algorithm, draft = config.speculative_algorithm, config.speculative_draft_model
    if (algorithm == "draft") != (draft is not None):
        raise ValueError(
            "speculative_draft_model must be given with speculative_algorithm draft, and only "
            f"then; got {draft!r} with {algorithm!r}"
        )
    if config.speculative_num_draft_tokens is not None and algorithm == "none":
        raise ValueError(
            "speculative_num_draft_tokens needs speculative_algorithm draft or ngram, got 'none'"
        )
    for name in ("speculative_ngram_min", "speculative_ngram_max"):
        if getattr(config, name) is not None and algorithm != "ngram":
            raise ValueError(f"{name} needs speculative_algorithm ngram, got {algorithm!r}")
    shortest, longest = config.ngram_sizes
    if longest < shortest:
        raise ValueError(
            f"speculative_ngram_max must be at least speculative_ngram_min ({shortest}), "
            f"got {longest}"
        )


def _check_nodes(config: EngineConfig) -> None:
    """Raises ValueError where the ranks cannot be laid out as asked."""
    size, nodes, address = config.tp_size, config.nnodes, config.dist_init_addr
    if size % nodes:
        raise ValueError(f"tp_size must be a multiple of nnodes ({nodes}), got {size}")
    if config.node_rank >= nodes:
        raise ValueError(f"node_rank must be below nnodes ({nodes}), got {config.node_rank}")
    if (address is None) != (nodes == 1):
        need = "must be host:port of node 0 where nnodes is above 1"
        raise ValueError(f"dist_init_addr {need}, and only there; got {address} with {nodes}")
    if address is not None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError(f"dist_init_addr must be host:port, got {address!r}")
    if size > 1 and config.device.startswith("cuda:"):
        raise ValueError(
            f"device must be auto, cpu or cuda where tp_size is above 1 (each rank takes a GPU of "
            f"its own), got {config.device!r}"
        )
