"""`Facts`: what the config and the models' own configs decide, before anything is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from minisgl import csrc
from minisgl.config import CUDA_GRAPH_MAX_BS, EngineConfig
from minisgl.device import Device
from minisgl.kernels.attention import attention
from minisgl.kernels.native import NATIVE_DTYPES
from minisgl.kernels.op import Op
from minisgl.models.config import DTYPES, ModelConfig
from minisgl.models.quantization import Quantization
from minisgl.start.attention_backend import attention_op
from minisgl.start.draft import DraftFacts, read_draft
from minisgl.step.sizes import GraphSizes


@dataclass(frozen=True)
class Facts:
    """What loading and scheduling need to know. The same on all ranks, but `draft` is rank 0's."""

    config: EngineConfig
    path: Path  # of the model
    model: ModelConfig
    dtype: torch.dtype  # of weights, activations and KV
    max_context: int
    cascade: bool  # whether steps may have cascade groups
    graphs: GraphSizes
    draft: DraftFacts | None = None
    attention: Op = attention  # of the model's prompts
    quantization: Quantization = Quantization()


def read_facts(config: EngineConfig, path: Path, device: Device, rank: int = 0) -> Facts:
    """Combine `config` with the model's own config at `path`.

    Raises ValueError naming a field that the model or the device does not allow. Downloads a draft
    model that is not on disk; with `batch_invariant` on a CPU waits for the native build.
    """
    model = ModelConfig.from_hf(path)
    dtype = model.dtype if config.dtype == "auto" else DTYPES[config.dtype]
    on_cpu = device.torch_device.type == "cpu"
    if config.dtype == "auto" and dtype == torch.float16 and on_cpu and config.keeps_codes:
        dtype = torch.bfloat16  # no native product with codes takes fp16
    max_context = config.context_length or model.max_context
    if max_context > model.max_context:
        raise ValueError(
            f"context_length must be at most the model's {model.max_context}, got {max_context}"
        )
    if config.batch_invariant:
        check_fixed_order(model, dtype, device.torch_device)
    draft = None
    if config.speculative_algorithm == "draft" and rank == 0:
        draft = read_draft(config, model, path, max_context)
    cascade, graphs = uses_cascade(config, model), graph_sizes(config, dtype, device)
    op = attention_op(config.attention_backend, model, dtype, config.page_size, device.torch_device)
    quantization = quantization_of(config, dtype, device.torch_device)
    return Facts(config, path, model, dtype, max_context, cascade, graphs, draft, op, quantization)


def quantization_of(config: EngineConfig, dtype: torch.dtype, device: torch.device) -> Quantization:
    """Which weights are rounded, and what they are multiplied with. Raises ValueError naming the
    field for what no kernel takes: inputs in 8 bits, but on a CPU in bf16."""
    head, possible = config.quantization_head, device.type == "cpu" and dtype == torch.bfloat16
    if head == "auto" and config.quantization != "auto":
        head = "none" if config.quantization == "none" else "int8"  # which few bits harm most
    if config.quantized_activations == "int8" and not possible:
        where = f"{device.type} with {dtype}"
        raise ValueError(f"quantized_activations int8 needs a CPU and bfloat16, got {where}")
    int8 = possible and config.quantized_activations != "none"
    return Quantization(config.quantization, head, config.quantization_group or 32, int8)


def uses_cascade(config: EngineConfig, model: ModelConfig) -> bool:
    """Whether steps may have cascade groups.

    Raises ValueError where they are asked for and the model cannot use them.
    """
    least = config.cascade_min_shared_tokens
    if all(layer.window is not None for layer in model.layers):
        if least is not None:
            raise ValueError(
                f"cascade_min_shared_tokens must be absent for {config.model}, got {least}: every "
                "layer has a sliding window, which leaves shared prefixes out"
            )
        return False
    return not (config.disable_cascade or config.disable_radix_cache or config.batch_invariant)


def graph_sizes(config: EngineConfig, dtype: torch.dtype, device: Device) -> GraphSizes:
    """The sizes of graphs. With drafts there are two widths, without and with all of them, to which
    steps are padded; where graphs cost nothing there is every width between, too."""
    if config.disable_cuda_graph:
        return GraphSizes({})
    most = min(config.max_running_requests, config.cuda_graph_max_bs or CUDA_GRAPH_MAX_BS)
    widths: Sequence[int] = (1,)
    if config.num_draft_tokens:
        longest = 1 + config.num_draft_tokens
        widths = (1, longest) if device.captures else range(1, longest + 1)
    steps = config.chunked_prefill_size + config.max_running_requests * widths[-1]
    in_pieces = min(steps, config.piecewise_cuda_graph_max_tokens or 0)
    any_size, multiple = not device.captures, device.row_multiple(dtype)
    return GraphSizes.of(most, widths, any_size, multiple, in_pieces)


def check_fixed_order(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError, naming the limit, where the batch-invariant mode is not possible."""
    if device.type != "cpu":
        return
    native = csrc.load("model_ops", wait=True)
    if native is None:
        raise ValueError(
            "batch_invariant needs the native CPU operators, which were not built: see the log"
        )
    if dtype not in NATIVE_DTYPES:
        raise ValueError(f"batch_invariant on CPU needs dtype bfloat16 or float32, got {dtype}")
    if model.head_dim not in native.HEAD_DIMS:
        raise ValueError(
            f"batch_invariant on CPU needs a head_dim among {list(native.HEAD_DIMS)}, "
            f"got {model.head_dim}"
        )
