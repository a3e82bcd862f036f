"""What cascade groups gain in the engine: decode steps of requests with a common long beginning.

    python -m benchmarks.cascade                                       # the bundled model
    python -m benchmarks.cascade --shape qwen3-0.6b --batch 64 --shared 4096 --device cuda
    python -m benchmarks.cascade --shape qwen3-0.6b --batch 8 --shared 1024 --device cpu

One loaded model serves the same requests with groups and without, in turns; each round gives one
ratio of the times of a step, and medians are reported. The tokens are compared: in fp32 and on a
CPU they must be equal, elsewhere the share of equal ones is shown. The last line is JSON.
"""

import argparse
import random
import statistics
import time

import torch

from benchmarks import models
from benchmarks.results import Results, add_options
from benchmarks.steps import Tokens, drain, equal_share, load, open_device, recorded, step
from minisgl.config import EngineConfig
from minisgl.core.request import Request, SamplingParams
from minisgl.step.executor import LocalExecutor

PAGE = 16
OWN = 16  # tokens of each prompt behind the common ones
WARMUP = 5  # tokens of each before steps count


def serve(
    executor: LocalExecutor, args: argparse.Namespace, vocab: int, least: int | None
) -> tuple[float, Tokens]:
    """Seconds of a decode step, and the tokens; with groups that save at least `least` tokens."""
    generator = random.Random(0)
    common = [generator.randrange(vocab) for _ in range(args.shared)]
    engine, recorder = recorded(executor, EngineConfig(cascade_min_shared_tokens=least))
    tokens: Tokens = {}

    def note() -> None:
        for delta in step(engine):
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)

    once = SamplingParams(temperature=0.0, max_tokens=1)
    engine.add(Request("first", [*common, 0], once))  # computes what the others find cached
    while engine.has_work():
        note()
    most = WARMUP + args.steps + args.batch  # they begin to decode one after another
    params = SamplingParams(temperature=0.0, max_tokens=most, ignore_eos=True)
    for i in range(args.batch):
        own = [generator.randrange(vocab) for _ in range(OWN)]
        engine.add(Request(str(i), common + own, params))
    while any(len(tokens.get(str(i), ())) < WARMUP for i in range(args.batch)):
        note()
    recorder.steps.clear()
    began = time.perf_counter()
    for _ in range(args.steps):
        note()
    seconds = (time.perf_counter() - began) / args.steps
    grouped = [bool(noted.batch.cascade_groups) for noted in recorder.steps]
    whole = all(noted.batch.num_decode == args.batch for noted in recorder.steps)
    if not whole or any(is_grouped != (least is not None) for is_grouped in grouped):
        raise RuntimeError("not every step decoded all sequences, in groups where it should")
    drain(engine)
    return seconds, {name: ids[: args.check] for name, ids in tokens.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models.add_options(parser)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--shared", type=int, default=512, help="tokens all prompts begin with")
    parser.add_argument("--steps", type=int, default=30, help="of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", type=int, default=16, help="tokens of each that are compared")
    add_options(parser)
    args = parser.parse_args()
    results = Results("cascade", args)
    with open_device(args.device) as device, models.chosen(args) as (model, load_format):
        length = OWN + WARMUP + args.steps + args.batch
        config = EngineConfig(
            model=model,
            dtype=args.dtype,
            load_format=load_format,
            max_running_requests=args.batch,
            max_total_tokens=args.shared + (args.batch + 1) * (length + 2 * PAGE),
            page_size=PAGE,
            cascade_min_shared_tokens=1,
        )
        facts, worker = load(config, device)
        executor = LocalExecutor(worker)
        results.put(
            model=args.shape or facts.path.name,
            device=device.name,
            dtype=str(worker.dtype).removeprefix("torch."),
            batch=args.batch,
            shared=args.shared,
        )
        exact = worker.dtype == torch.float32 or device.torch_device.type == "cpu"
        seconds: dict[str, list[float]] = {"groups": [], "plain": []}
        found: dict[str, Tokens] = {}
        for turn in range(args.rounds):
            if turn and results.is_late(f"round {turn}"):
                break
            for name in list(seconds)[:: -1 if turn % 2 else 1]:
                least = 1 if name == "groups" else None
                took, found[name] = serve(executor, args, facts.model.vocab_size, least)
                seconds[name].append(took)
            ratios = [a / b for a, b in zip(seconds["plain"], seconds["groups"], strict=True)]
            results.put(
                rounds=turn + 1,
                grouped_step_ms=1e3 * statistics.median(seconds["groups"]),
                plain_step_ms=1e3 * statistics.median(seconds["plain"]),
                times_as_fast=statistics.median(ratios),
                equal_tokens=equal_share(found, exact),
            )
    said = results.content
    print(
        f"{said['model']} {said['dtype']} on {said['device']}: {args.batch} sequences share "
        f"{args.shared} tokens; a step takes {said['plain_step_ms']:.3f} ms, in groups "
        f"{said['grouped_step_ms']:.3f} ms: {said['times_as_fast']:.2f} times as fast; "
        f"{said['equal_tokens']:.1%} of tokens equal"
    )
    results.finish()


if __name__ == "__main__":
    main()
