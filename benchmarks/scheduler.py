"""Microseconds per scheduler step (plan and update) with an executor that computes nothing.

    python -m benchmarks.scheduler [--steps N]

Decoding sequences run in steady state, one step ahead of their results as in serving; where they
are grouped, all share a prompt and are one cascade group. The mix adds prompts with shared prefixes
that arrive, prefill in chunks, finish and are replaced. Times are CPU times of the thread, so that
a busy machine does not blur them. Then come plans alone, where long prompts could make them slow:
`full_pool` decodes while prompts wait that do not fit, `prompt` computes one of 128k tokens in
chunks, `ngram` computes prompts and drafts for them. Last come 600 requests in a pool of 65,536
tokens, by page size: preemptions, and prompt tokens computed for each one asked. Prints tables,
then one JSON line.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from random import Random

from minisgl.config import EngineConfig
from minisgl.core.batch import Batch, StepOutput
from minisgl.core.executor import Limits
from minisgl.core.ngram import NGramProposer
from minisgl.core.request import Request, SamplingParams
from minisgl.core.scheduler import Scheduler
from minisgl.core.speculation import Speculation

PAGE_SIZE = 16
VOCAB = 32_000


def run_plans(scheduler: Scheduler, random: Random) -> Iterator[tuple[Batch, float, float]]:
    """Plan one step ahead for ever; yields each batch, and the seconds of its plan and its step."""
    unread: tuple[Batch, StepOutput] | None = None
    gc.collect()  # the prompts made here, which a plan would else be charged with
    while True:
        begin = time.thread_time()
        batch = scheduler.plan()
        planning = seconds = time.thread_time() - begin
        if unread is not None:
            begin = time.thread_time()
            scheduler.update(*unread)
            seconds += time.thread_time() - begin
        unread = None
        if batch is not None:
            token = random.randrange(1, VOCAB)
            sampled = [[token] if chunk.samples else [] for chunk in batch.chunks]
            unread = batch, StepOutput(batch.step, sampled)
            yield batch, planning, seconds


def run_steps(scheduler: Scheduler, random: Random) -> Iterator[tuple[Batch, float]]:
    """The same, with the seconds of the step alone."""
    for batch, _, seconds in run_plans(scheduler, random):
        yield batch, seconds


def make_scheduler(num_rows: int, num_tokens: int, page_size: int = PAGE_SIZE) -> Scheduler:
    limits = Limits(-(-num_tokens // page_size), page_size, num_rows, 1 << 20, VOCAB)
    config = EngineConfig(chunked_prefill_size=4096, cascade_min_shared_tokens=4096)
    return Scheduler(limits, config, (0,))


def decode(num_running: int, num_steps: int, num_shared: int = 0) -> list[float]:
    """Seconds per step with `num_running` sequences decoding, whose prompts begin alike."""
    random = Random(0)
    length = 2 * num_steps + 600 + num_shared
    shared = [random.randrange(1, VOCAB) for _ in range(num_shared)]
    scheduler = make_scheduler(num_running, num_running * length)
    for index in range(num_running):
        prompt = shared + [random.randrange(1, VOCAB) for _ in range(random.randrange(16, 64))]
        params = SamplingParams(max_tokens=length - 100 - num_shared)
        scheduler.add(Request(str(index), prompt, params))
    steps = run_steps(scheduler, random)
    for batch, _ in steps:
        if batch.num_decode == num_running:
            break
    for _ in range(PAGE_SIZE):
        next(steps)
    return [next(steps)[1] for _ in range(num_steps)]


def mix(num_running: int, num_steps: int) -> list[float]:
    """Seconds per step when prompts of about 2,000 tokens keep coming, two thirds of it shared."""
    random = Random(0)
    scheduler = make_scheduler(num_running, num_running * 3000)
    shared = [[random.randrange(1, VOCAB) for _ in range(1400)] for _ in range(8)]
    seconds, added = list[float](), 0

    def refill() -> None:
        nonlocal added
        while scheduler.stats().num_waiting < 8:
            tail = [random.randrange(1, VOCAB) for _ in range(random.randrange(100, 1200))]
            params = SamplingParams(max_tokens=random.randrange(16, 128))
            scheduler.add(Request(str(added), random.choice(shared) + tail, params))
            added += 1

    refill()
    for _, step in run_steps(scheduler, random):
        seconds.append(step)
        if len(seconds) == 2 * num_steps:
            break
        refill()
    return seconds[num_steps:]


def pressure(page_size: int, num_requests: int = 600) -> tuple[int, float]:
    """Preemptions in a pool that is always full, and prompt tokens computed for each one asked."""
    random = Random(0)
    limits = Limits(65_536 // page_size, page_size, 256, 65_536, VOCAB)
    scheduler = Scheduler(limits, EngineConfig(chunked_prefill_size=4096), (0,))
    num_asked = num_computed = 0
    for index in range(num_requests):
        prompt = [random.randrange(1, VOCAB) for _ in range(random.randrange(64, 1000))]
        params = SamplingParams(max_tokens=random.randrange(64, 1000), ignore_eos=True)
        scheduler.add(Request(str(index), prompt, params))
        num_asked += len(prompt)
    for batch, _ in run_steps(scheduler, random):
        num_computed += sum(chunk.length for chunk in batch.chunks[batch.num_decode :])
        if len(batch.chunks) == 1 and not scheduler.stats().num_waiting:
            break  # the last one decodes
    return scheduler.stats().num_preemptions, num_computed / num_asked


def full_pool(page_size: int, num_steps: int) -> list[float]:
    """Seconds per plan: 44 sequences decode, 56 of 100k tokens, 96k of them shared, do not fit."""
    random = Random(0)
    shared = [random.randrange(1, VOCAB) for _ in range(96_000)]
    scheduler = make_scheduler(256, 96_000 + 44 * 4_000 + 3_000 + 44 * num_steps, page_size)
    for index in range(100):
        tail = [random.randrange(1, VOCAB) for _ in range(4_000)]
        scheduler.add(Request(str(index), shared + tail, SamplingParams(max_tokens=8 * num_steps)))
    plans = run_plans(scheduler, random)
    for batch, _, _ in plans:
        if len(batch.chunks) == batch.num_decode >= 44:
            break
    return [next(plans)[1] for _ in range(num_steps)]


def ngram(num_prompts: int, length: int) -> list[float]:
    """Seconds per plan: prompts of `length` tokens are computed, then decode with n-gram drafts."""
    random = Random(0)
    limits = Limits(num_prompts * length, PAGE_SIZE, num_prompts, 1 << 20, VOCAB)
    config = EngineConfig(chunked_prefill_size=4096)
    speculation = Speculation(NGramProposer(*config.ngram_sizes), 3)
    scheduler = Scheduler(limits, config, (0,), speculation=speculation)
    for index in range(num_prompts):
        tokens = [random.randrange(1, VOCAB) for _ in range(length)]
        scheduler.add(Request(str(index), tokens, SamplingParams(max_tokens=1000)))
    plans = run_plans(scheduler, random)
    return [next(plans)[1] for _ in range(num_prompts * length // 4096 + 200)]


def prompt(page_size: int, length: int = 131_072) -> list[float]:
    """Seconds per plan of one prompt's chunks."""
    random = Random(0)
    scheduler = make_scheduler(1, length + 100, page_size)
    tokens = [random.randrange(1, VOCAB) for _ in range(length)]
    scheduler.add(Request("", tokens, SamplingParams(max_tokens=100)))
    plans = run_plans(scheduler, random)
    return [next(plans)[1] for _ in range(length // 4096)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=320, help="steps timed per case")
    steps = parser.parse_args().steps
    cases: dict[str, tuple[Callable[[int, int], list[float]], int]]
    cases = {f"decode_{n}": (decode, n) for n in (1, 64, 256, 1024)}
    cases["grouped_256"] = (partial(decode, num_shared=1024), 256)
    cases["mix_64"] = (mix, 64)
    result: dict[str, float] = {}
    print(f"{'case':12} {'median us':>10} {'mean us':>10} {'p99 us':>10} {'us / seq':>10}")
    for name, (case, count) in cases.items():
        times = sorted(1e6 * t for t in case(count, steps))
        median, mean = statistics.median(times), statistics.fmean(times)
        p99 = times[int(0.99 * (len(times) - 1))]
        print(f"{name:12} {median:10.1f} {mean:10.1f} {p99:10.1f} {median / count:10.2f}")
        result[name] = round(median, 1)
    print(f"\n{'plans':20} {'median us':>10} {'max us':>10}")
    plans: dict[str, Callable[[], list[float]]] = {}
    for page_size in (1, 16):
        plans[f"full_pool_page_{page_size}"] = partial(full_pool, page_size, 64)
        plans[f"prompt_page_{page_size}"] = partial(prompt, page_size)
    plans["ngram_1x32k"] = partial(ngram, 1, 32_000)
    plans["ngram_8x100k"] = partial(ngram, 8, 100_000)
    for name, plan in plans.items():
        times = [1e6 * t for t in plan()]
        print(f"{name:20} {statistics.median(times):10.1f} {max(times):10.1f}")
        result[name] = round(statistics.median(times), 1)
        result[f"{name}_max"] = round(max(times), 1)
    print(f"\n{'page size':12} {'preempted':>10} {'computed':>10}")
    for page_size in (1, 16, 64):
        preempted, computed = pressure(page_size)
        print(f"{page_size:<12} {preempted:10} {computed:10.2f}")
        result[f"preemptions_page_{page_size}"] = preempted
    print(json.dumps({"benchmark": "scheduler", "unit": "us_per_step_median", **result}))


if __name__ == "__main__":
    main()
