"""A simulated device: steps take the time of a roofline that the scheduler only estimates.

And one whose steps are counted, not timed.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from minisgl.config import EngineConfig
from minisgl.core.batch import Batch, StepOutput
from minisgl.core.costmodel import CostModel, DevicePeaks, ModelSizes, Work, prefill_work
from minisgl.core.executor import Limits
from minisgl.core.request import Request, SamplingParams
from minisgl.core.scheduler import Scheduler
from tests.world.books import check_books

MODEL = ModelSizes(  # about 0.6 billion weights
    layers=28,
    hidden=1024,
    heads=16,
    kv_heads=8,
    head_dim=128,
    intermediate=3072,
    vocab=32_000,
)
# Peaks as a data sheet states them. The first has its ridge at 8 tokens, the second at 1,500.
COMPUTE_BOUND = DevicePeaks(0.4e12, 50e9, 1e-3)
MEMORY_BOUND = DevicePeaks(3000e12, 2e12, 1e-4)


@dataclass
class Truth:
    """What the device really reaches of its peaks, and how much its times scatter."""

    facts: DevicePeaks
    compute: float = 0.6
    memory: float = 0.8
    overhead: float = 5e-4
    noise: float = 0.03

    def seconds(self, batch: Batch, random: Random) -> float:
        flops = traffic = 0.0
        weights = MODEL.layers * MODEL.hidden * (128 * 48 + 3 * MODEL.intermediate)
        head = MODEL.hidden * MODEL.vocab
        for chunk in batch.chunks:
            pairs = chunk.length * (chunk.start + (chunk.length + 1) / 2)
            flops += 2 * weights * chunk.length + 2 * head * chunk.samples
            flops += 4 * MODEL.layers * 16 * 128 * pairs
            traffic += 2 * MODEL.layers * 8 * 128 * 2 * (chunk.start + 2 * chunk.length)
        traffic += 2 * (weights + head)
        arithmetic = flops / (self.compute * self.facts.flops)
        memory = traffic / (self.memory * self.facts.bandwidth)
        scatter = max(random.gauss(1.0, self.noise), 0.5)
        return (self.overhead + max(arithmetic, memory)) * scatter


@dataclass
class Run:
    """What users saw of a simulated run."""

    seconds: float = 0.0
    num_tokens: int = 0
    gaps: list[float] = field(default_factory=list)  # between the tokens of one stream
    first_tokens: dict[str, float] = field(default_factory=dict)
    steps: list[tuple[float, Batch]] = field(default_factory=list)

    @property
    def throughput(self) -> float:
        return self.num_tokens / self.seconds

    def gap(self, quantile: float) -> float:
        return sorted(self.gaps)[int(quantile * (len(self.gaps) - 1))]


def simulate(
    config: EngineConfig,
    truth: Truth,
    arrivals: list[tuple[float, Request]],
    *,
    max_rows: int = 64,
    seed: int = 0,
    on_step: Callable[[Scheduler], None] | None = None,
) -> Run:
    """Serve `arrivals` (seconds, request), in order of time, to their ends."""
    random, run = Random(seed), Run()
    limits = Limits(100_000, 16, max_rows, 100_000, MODEL.vocab)
    model = CostModel(MODEL, truth.facts)
    scheduler = Scheduler(limits, config, (), model, lambda: run.seconds)
    waiting, last = list(reversed(arrivals)), dict[str, float]()
    while waiting or scheduler.has_work:
        while waiting and waiting[-1][0] <= run.seconds:
            scheduler.add(waiting.pop()[1])
        batch = scheduler.plan()
        if batch is None:
            run.seconds = waiting[-1][0]
            continue
        seconds = truth.seconds(batch, random)
        run.seconds += seconds
        run.steps.append((seconds, batch))
        output = [[1] if chunk.samples else [] for chunk in batch.chunks]
        for delta in scheduler.update(batch, StepOutput(batch.step, output, seconds=seconds)):
            if delta.request_id in last:
                run.gaps.append(run.seconds - last[delta.request_id])
            else:
                run.first_tokens[delta.request_id] = run.seconds
            last[delta.request_id] = run.seconds
        run.num_tokens += batch.num_tokens
        if on_step is not None:
            on_step(scheduler)
    return run


def workload(
    count: int, prompt: tuple[int, int], output: tuple[int, int], rate: float, seed: int = 0
) -> list[tuple[float, Request]]:
    """`count` requests of random lengths, `rate` a second (Poisson), or all at once (inf)."""
    random, now, arrivals = Random(seed), 0.0, []
    for index in range(count):
        now += random.expovariate(rate) if rate != float("inf") else 0.0
        ids = [random.randrange(1, MODEL.vocab) for _ in range(random.randint(*prompt))]
        params = SamplingParams(max_tokens=random.randint(*output))
        arrivals.append((now, Request(str(index), ids, params)))
    return arrivals


@dataclass
class Counts:
    """What users saw of a run that is counted in steps."""

    num_steps: int = 0
    most_running: int = 0
    waits: dict[str, int] = field(default_factory=dict)  # steps planned until the first token
    ends: list[str] = field(default_factory=list)  # request ids, in order of their ends


def count_steps(
    scheduler: Scheduler,
    arrivals: dict[int, list[Request]],
    *,
    depth: int = 0,
    seconds: Callable[[Batch], float] = lambda batch: 0.0,
    most: int = 10_000,
) -> Counts:
    """Serve requests that arrive before the step given, `depth` steps ahead, `most` steps long."""
    counts, in_flight = Counts(), deque[tuple[int, Batch]]()
    arrived = dict[str, int]()
    while counts.num_steps < most and (scheduler.has_work or counts.num_steps <= max(arrivals)):
        for request in arrivals.get(counts.num_steps, ()):
            if request.id not in arrived:
                scheduler.add(request)
                arrived[request.id] = counts.num_steps
        batch = scheduler.plan()
        if batch is not None:
            in_flight.append((counts.num_steps, batch))
        elif not in_flight and not scheduler.has_work:
            batch = Batch(-1, [], 0, [], [], [], [])  # idle until the next arrival
        counts.num_steps += batch is not None
        counts.most_running = max(counts.most_running, scheduler.stats().num_running)
        if in_flight and len(in_flight) > (depth if batch is not None else 0):
            step, oldest = in_flight.popleft()
            output = [[1] if chunk.samples else [] for chunk in oldest.chunks]
            results = StepOutput(oldest.step, output, seconds=seconds(oldest))
            for delta in scheduler.update(oldest, results):
                counts.waits.setdefault(delta.request_id, step + 1 - arrived[delta.request_id])
                if delta.finish_reason is not None:
                    counts.ends.append(delta.request_id)
            check_books(scheduler)
    return counts


def seconds_on(device: DevicePeaks) -> Callable[[Batch], float]:
    """The seconds of a batch on a device that keeps its data sheet's promises."""
    truth = CostModel(MODEL, device)

    def seconds(batch: Batch) -> float:
        work = Work(0, 0, 0, 0)
        for chunk in batch.chunks:
            work += prefill_work(chunk.length, chunk.start, samples=chunk.samples)
        return truth.predict(work)

    return seconds
