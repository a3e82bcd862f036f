"""python -m minisgl.analyze: what prefill and decode of a model cost on a device, and why.

For each prompt length and each batch of streams: FLOPs, bytes, arithmetic intensity, predicted
time, and whether arithmetic or memory traffic bounds it. The figures are the roofline's (see
minisgl.core.costmodel), from data-sheet peaks: a lower bound on times, not a measurement.
"""

import argparse
import re
from bisect import bisect_left
from collections.abc import Sequence

from minisgl.config import EngineConfig
from minisgl.core.costmodel import (
    DEVICES,
    Cost,
    CostModel,
    DevicePeaks,
    ModelSizes,
    decode_work,
    prefill_work,
)
from minisgl.core.policy import TokenBudget
from minisgl.models.presets import PRESETS

DTYPES = ("bfloat16", "float16", "float32")
MAX_STREAMS = 1 << 16


def load_sizes(model: str, dtype: str) -> ModelSizes:
    """The sizes of a preset, or of an HF directory or hub id.

    Raises ValueError for a config.json that cannot be read as a known family's.
    """
    # torch is needed only here.
    import torch

    from minisgl.models.config import ModelConfig
    from minisgl.models.hub import model_directory

    if model.lower() in PRESETS:
        config = ModelConfig.from_dict(PRESETS[model.lower()], where=model)
    else:
        config = ModelConfig.from_hf(model_directory(model, weights=False, known=PRESETS))
    return ModelSizes(**config.cost_sizes(getattr(torch, dtype)))


def ridge_streams(model: CostModel, context: int) -> int | None:
    """The fewest streams whose decode is bound by arithmetic; None where no number is."""

    def is_busy(streams: int) -> bool:
        return model.cost(decode_work(streams, streams * context)).bound == "compute"

    streams = range(1, MAX_STREAMS + 1)
    found = bisect_left(streams, True, key=is_busy)
    return streams[found] if found < len(streams) else None


def report(
    model: CostModel, batches: Sequence[int], prompts: Sequence[int], contexts: Sequence[int]
) -> str:
    """The whole analysis as text."""
    sizes, device = model.model, model.device
    ridge = device.flops / device.bandwidth
    lines = [
        f"weights     {_scaled(sizes.weights * sizes.bytes_per_weight)}B in matrix products",
        f"KV          {_scaled(sizes.kv_bytes_per_token)}B a token",
        f"device      {_scaled(device.flops)}FLOP/s, {_scaled(device.bandwidth)}B/s",
        f"ridge       {ridge:.0f} FLOPs a byte",
        "",
        "prefill, one prompt alone in a step",
        _heading("tokens"),
    ]
    for length in prompts:
        cost = model.cost(prefill_work(length))
        lines.append(_line([str(length)], cost, length))
    lines += ["", "decode, one token for each stream in a step", _heading("streams", "context")]
    for context in contexts:
        for streams in batches:
            cost = model.cost(decode_work(streams, streams * context))
            lines.append(_line([str(streams), str(context)], cost, streams))
    lines += ["", "where decode stops being bound by memory, and what `balanced` adds to a step"]
    lines.append(f"{'context':>10} {'streams':>10} {'prompt tokens beside ' + str(batches[0]):>28}")
    budget = TokenBudget(EngineConfig(chunked_prefill_size=1 << 16), model)
    for context in contexts:
        busy = ridge_streams(model, context)
        beside = budget.prefill_tokens(decode_work(batches[0], batches[0] * context), 0)
        lines.append(f"{context:10} {'never' if busy is None else busy:>10} {beside:28}")
    return "\n".join(lines)


def _heading(*names: str) -> str:
    columns = [*names, "FLOPs", "bytes", "FLOPs/byte", "compute ms", "memory ms", "step ms"]
    return " ".join(f"{column:>10}" for column in columns) + f" {'tokens/s':>10}  bound"


def _line(names: list[str], cost: Cost, num_tokens: int) -> str:
    figures = [
        *names,
        _scaled(cost.flops),
        _scaled(cost.bytes),
        f"{cost.intensity:.1f}",
        f"{1e3 * cost.compute_seconds:.3f}",
        f"{1e3 * cost.memory_seconds:.3f}",
        f"{1e3 * cost.seconds:.3f}",
        f"{num_tokens / cost.seconds:.0f}",
    ]
    return " ".join(f"{figure:>10}" for figure in figures) + f"  {cost.bound}"


def _scaled(value: float) -> str:
    """Three digits and a decimal prefix: 1.23 G."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} P"


def _counts(text: str) -> list[int]:
    if not re.fullmatch(r"0*[1-9]\d*(,0*[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"must be whole numbers of at least 1, got {text!r}")
    return [int(part) for part in text.split(",")]


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be greater than 0, got {text!r}")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m minisgl.analyze", description=(__doc__ or "").split(": ", 1)[1]
    )
    add = parser.add_argument
    add("--model", required=True, help=f"HF directory, hub id, or one of {', '.join(PRESETS)}")
    add("--device", default="h100", choices=sorted(DEVICES), help="data sheet to use")
    add("--dtype", default="bfloat16", choices=DTYPES, help="of weights and KV")
    add("--batch", default="1,16,64,256", type=_counts, help="streams decoding at once")
    add("--prompt", default="128,1024,8192", type=_counts, help="prompt lengths in tokens")
    add("--context", default="1024,8192", type=_counts, help="tokens that each stream holds")
    add("--tp-size", default=1, type=int, help="devices sharing the work; their talk is free here")
    add("--peak-tflops", type=_positive, help="in place of the data sheet's, of 16-bit numbers")
    add("--bandwidth-gbs", type=_positive, help="in place of the data sheet's")
    options = parser.parse_args(arguments)
    if options.tp_size < 1:
        parser.error(f"--tp-size must be at least 1, got {options.tp_size}")
    sheet = DEVICES[options.device]
    flops = sheet.flops if options.peak_tflops is None else 1e12 * options.peak_tflops
    bandwidth = sheet.bandwidth if options.bandwidth_gbs is None else 1e9 * options.bandwidth_gbs
    device = DevicePeaks(
        options.tp_size * flops, options.tp_size * bandwidth, overhead=sheet.overhead
    )
    try:
        sizes = load_sizes(options.model, options.dtype)
    except (OSError, ValueError) as error:
        parser.error(f"--model: {error}")
    print(f"{options.model} in {options.dtype} on {options.tp_size} x {options.device}\n")
    print(report(CostModel(sizes, device), options.batch, options.prompt, options.context))


if __name__ == "__main__":
    main()
