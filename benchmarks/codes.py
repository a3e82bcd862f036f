"""Products with weights of 4 and 8 bits on a CPU: times as fast as those of bf16 weights in panels.

    python -m benchmarks.codes                        # Qwen3-0.6B's five shapes, 1 to 1,024 rows
    python -m benchmarks.codes --shape 1024x6144 --rows 1 16

The forms take turns within a round, and the fastest of the rounds counts, so that a machine which
is busy with something else disturbs ratios little. Calls of few rows go around so many copies of a
weight that none is in a cache, as a step finds them. The last line is JSON.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle

import torch

from minisgl import csrc
from minisgl.device.cpu import lazy_zeros
from minisgl.kernels.grouped_linear.panels import GroupedPanels
from minisgl.kernels.grouped_linear.weights import Grouped
from minisgl.kernels.linear.panels import Panels
from minisgl.kernels.matrix import Matrix, packed, product, tensors

SHAPES = ((1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024), (1024, 151936))
ROWS = (1, 4, 16, 64, 1024)
COLD = 128 * 2**20  # bytes that no cache holds


def coded(inputs: int, outputs: int, bits: int, minimums: bool) -> Matrix:
    """Random codes in groups of 32; where they have no minimums of their own, these follow from
    the scales, as in Q4_0 and Q8_0."""
    codes = torch.randint(0, 2**bits, (outputs, inputs), dtype=torch.uint8)
    scales = (torch.rand(outputs, inputs // 32) / inputs).half().float()
    least = -(2.0 ** (bits - 1)) * scales
    least = (least * 1.25).half().float() if minimums else least
    return packed(Grouped(codes, scales, least, torch.bfloat16, "int8"))


def forms(inputs: int, outputs: int) -> dict[str, Matrix]:
    """A random weight as it is multiplied with, by name."""
    return {
        "bf16": packed(torch.randn(outputs, inputs).bfloat16()),
        "int4": coded(inputs, outputs, 4, True),
        "Q4_0": coded(inputs, outputs, 4, False),
        "int8": coded(inputs, outputs, 8, False),
    }


def copies(weight: Matrix, rows: int) -> list[Matrix]:
    """As many as are in no cache, where there are so few rows that they are read from memory."""
    held = sum(tensor.nbytes for tensor in tensors(weight))
    count = 1 if rows > 64 else -(-COLD // held)
    return [_copy(weight) for _ in range(count)]


def _copy(weight: Matrix) -> Matrix:
    if isinstance(weight, Panels):
        return Panels(_in_huge_pages(weight.values), weight.num_rows)
    assert isinstance(weight, GroupedPanels)
    least = None if weight.minimums is None else _in_huge_pages(weight.minimums)
    own = _in_huge_pages(weight.codes), _in_huge_pages(weight.scales), least
    return GroupedPanels(*own, weight.num_rows, weight.dtype, weight.activations)


def _in_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    return lazy_zeros(tensor.shape, tensor.dtype).copy_(tensor)


def fastest(calls: dict[str, Callable[[], object]], budget: float) -> dict[str, float]:
    """Seconds of each call, in turns for as long as the budget in seconds, but for three rounds."""
    best = dict.fromkeys(calls, float("inf"))
    end, rounds = time.perf_counter() + budget, 0
    while rounds < 3 or time.perf_counter() < end:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - begin)
        rounds += 1
    return best


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("benchmarks.codes", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    shapes = [f"{k}x{n}" for k, n in SHAPES]
    parser.add_argument("--shape", nargs="+", default=shapes, help="inputs x outputs")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a line takes")
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if csrc.load("model_ops", wait=True) is None:
        parser.error("nothing native is built")
    lines = []
    print("| inputs, outputs | rows | bf16, ms | " + " | ".join(("int4", "Q4_0", "int8")) + " |")
    for shape in args.shape:
        inputs, outputs = map(int, shape.split("x"))
        weights = forms(inputs, outputs)
        for rows in args.rows:
            x = torch.randn(rows, inputs).bfloat16()
            calls: dict[str, Callable[[], object]] = {}
            for name, weight in weights.items():
                own = cycle(copies(weight, rows))
                calls[name] = partial(lambda x, own: product(x, next(own)), x, own)
            seconds = fastest(calls, args.budget)
            bf16 = seconds["bf16"]
            ratios = {name: bf16 / own for name, own in seconds.items() if name != "bf16"}
            cells = " | ".join(f"{ratio:.2f}x" for ratio in ratios.values())
            print(f"| {inputs}, {outputs} | {rows} | {bf16 * 1e3:.3f} | {cells} |", flush=True)
            lines.append({"shape": shape, "rows": rows, "bf16_seconds": bf16, **ratios})
    print(json.dumps(lines))


if __name__ == "__main__":
    main()
