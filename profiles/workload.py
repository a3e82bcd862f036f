"""The work that the profiles look at: requests that decode together, from a warm engine.

    python -m profiles.workload --shape qwen3-0.6b --batch 16 --steps 64

Run by itself it is for tools that attach from outside: the steps lie between cudaProfilerStart and
cudaProfilerStop, and layers and ops have NVTX ranges.
"""

import argparse
import random
import tempfile
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from benchmarks import models
from benchmarks.steps import drain, step
from minisgl.build import build_engine
from minisgl.config import EngineConfig, LoadFormat
from minisgl.core.request import Request, SamplingParams
from minisgl.engine.engine import Engine

WARM_UP_STEPS = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    models.add_options(parser)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, default=8, help="requests that decode together")
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--steps", type=int, default=32, help="decode steps that are profiled")
    parser.add_argument("--disable-overlap-schedule", action="store_true")
    parser.add_argument("--disable-cuda-graph", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")


def engine_config(
    args: argparse.Namespace,
    model: str | None,
    load_format: LoadFormat,
    profile_dir: Path | None = None,
) -> EngineConfig:
    """What the options ask for."""
    return EngineConfig(
        model=model,
        load_format=load_format,
        device=args.device,
        dtype=args.dtype,
        max_running_requests=args.batch,
        max_total_tokens=args.batch * (args.input_len + _output_len(args) + 64),
        disable_radix_cache=True,
        disable_overlap_schedule=args.disable_overlap_schedule,
        disable_cuda_graph=args.disable_cuda_graph,
        profile_dir=None if profile_dir is None else str(profile_dir),
    )


@contextmanager
def open_engine(args: argparse.Namespace, profile_dir: Path) -> Iterator[Engine]:
    """The engine that the options ask for."""
    with models.chosen(args) as (model, load_format):
        engine = build_engine(engine_config(args, model, load_format, profile_dir))
    try:
        yield engine
    finally:
        engine.close()


def decoding(engine: Engine, args: argparse.Namespace) -> Generator[None, None, None]:
    """Yields when every request decodes, then after each step. Closing it ends the requests.

    RuntimeError when a step fails.
    """
    generator = random.Random(0)
    vocab = engine.info.limits.vocab_size
    params = SamplingParams(max_tokens=_output_len(args), ignore_eos=True, temperature=1.0, seed=0)
    waiting = set()
    for index in range(args.batch):
        prompt = [generator.randrange(vocab) for _ in range(args.input_len)]
        engine.add(Request(f"profiled-{index}", prompt, params))
        waiting.add(f"profiled-{index}")
    while waiting:
        waiting -= {delta.request_id for delta in step(engine)}
    for _ in range(WARM_UP_STEPS):
        step(engine)
    try:
        yield
        for _ in range(args.steps):
            step(engine)
            yield
    finally:
        drain(engine)


def profile(args: argparse.Namespace, directory: Path, *, traces: bool) -> Path:
    """Profile the steps; the folder with the files."""
    with open_engine(args, directory) as engine, closing(decoding(engine, args)) as steps:
        next(steps)
        folder = engine.start_profile(args.steps, traces=traces)
        for _ in steps:
            pass
    return Path(folder)


def _output_len(args: argparse.Namespace) -> int:
    """Enough for the first request to decode still when the last one has its profile taken."""
    prefill_steps = args.batch * args.input_len // 256
    return args.steps + 2 * WARM_UP_STEPS + prefill_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    args = parser.parse_args()
    if args.dry_run:
        print(f"{args.steps} decode steps of {args.batch} requests")
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        open_engine(args, Path(folder)) as engine,
        closing(decoding(engine, args)) as steps,
    ):
        next(steps)
        on_cuda = not engine.info.device.startswith("CPU")
        if on_cuda:
            torch.cuda.profiler.start()
        for _ in steps:
            pass
        if on_cuda:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
    print(f"ran {args.steps} decode steps of {args.batch} requests on {engine.info.device}")


if __name__ == "__main__":
    main()
