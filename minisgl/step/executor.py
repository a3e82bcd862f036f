"""`LocalExecutor`: the engine's `Executor` over one worker of this process."""

from collections import deque
from dataclasses import dataclass

import torch

from minisgl.core.batch import Batch, StepOutput
from minisgl.core.executor import GrammarMasks, Limits
from minisgl.core.request import TokenLogprobs
from minisgl.device import Event
from minisgl.interrupts import let_through
from minisgl.step.inputs import pack_step
from minisgl.step.profiler import RankProfiler
from minisgl.step.proposals import read_drafts
from minisgl.step.runner import Step
from minisgl.step.worker import Worker


@dataclass
class _InFlight:
    """A dispatched step, until it is collected."""

    number: int
    step: Step | None  # None when it could not even be packed
    proposed: Event | None = None  # where the device proposes its drafts
    done: Event | None = None  # once its sampling is enqueued


class LocalExecutor:
    """Owned by the engine's thread, which plans; the work runs on the worker's device.

    Any failure of a step, from a malformed batch to an error in a kernel, is raised by `collect`.
    """

    def __init__(self, worker: Worker, *, rank: int = 0, trace_details: bool = False) -> None:
        """`trace_details`: NVTX ranges for layers and ops too, where a tool is attached."""
        self._worker = worker
        self._profiler = RankProfiler(worker.device, rank, details=trace_details)
        self._in_flight: deque[_InFlight] = deque()

    @property
    def limits(self) -> Limits:
        return self._worker.limits

    @property
    def weight_bytes(self) -> int | None:
        """What a step reads of this rank's weights, where that is known."""
        return self._worker.weight_bytes

    @property
    def compilations(self) -> int:
        return self._worker.compilations()

    def dispatch(self, batch: Batch) -> None:
        worker, device = self._worker, self._worker.device
        step = proposed = None
        try:
            step = Step(pack_step(batch, worker.host_rows, worker.geometry))
        except Exception as failure:  # raised at collect, as every failure is
            device.submit(_fail, failure)
        else:
            if step.packed.num_passes:
                device.submit(worker.runner.begin, step)
                proposed = device.landed()
            device.submit(worker.runner.forward, step)
        self._in_flight.append(_InFlight(batch.step, step, proposed))

    def drafts(self, step: int) -> list[list[int]]:
        asked = next(each for each in self._in_flight if each.number == step)
        if asked.step is None:
            self._worker.device.landed().wait()  # raises what kept it from being packed
        if asked.step is None or asked.proposed is None:
            raise ValueError(f"step {step} has no drafts that the device proposes")
        asked.proposed.wait()
        assert asked.step.drafted is not None
        return read_drafts(asked.step.packed.batch, asked.step.drafted.tolist())

    def sample(self, step: int, masks: GrammarMasks | None = None) -> None:
        oldest = next((each for each in self._in_flight if each.done is None), None)
        if oldest is None or oldest.number != step:
            raise ValueError(f"step {step} is not the oldest one dispatched and not sampled")
        device = self._worker.device
        if oldest.step is not None:
            device.submit(self._worker.runner.sample, oldest.step, masks)
        oldest.done = device.landed()

    def collect(self) -> StepOutput:
        if not self._in_flight or self._in_flight[0].done is None:
            raise ValueError("no sampled step is in flight")
        oldest = self._in_flight[0]
        assert oldest.done is not None
        with let_through():
            oldest.done.wait()
        self._in_flight.popleft()
        assert oldest.step is not None  # a step that was not packed has failed the stream
        return _read(oldest.step, self._profiler.spans(oldest.step.events))

    def start_profile(self, *, traces: bool) -> None:
        self._profiler.start(traces=traces)

    def stop_profile(self, directory: str) -> list[str]:
        return self._profiler.stop(directory)

    def check(self) -> None:
        pass  # one process: whatever fails, fails in a step

    def close(self) -> None:
        self._in_flight.clear()
        self._worker.close()


def _fail(failure: Exception) -> None:
    raise failure


def _read(step: Step, device_spans: list[tuple[float, float]]) -> StepOutput:
    """The output of a step whose last event has passed."""
    packed, sampled = step.packed, step.sampled
    chunks = packed.batch.chunks
    token_ids: list[list[int]] = [[] for _ in chunks]
    logprobs: dict[int, list[TokenLogprobs]] = {}
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    if sampled.drawn is not None:
        drawn = sampled.drawn.tolist()
        accepted = drawn[packed.num_points :] or [0] * len(packed.sampling)
        spans = zip(packed.sampling, packed.first_points, accepted, strict=False)
        for i, first, count in spans:  # what follows belongs to padding
            token_ids[i] = drawn[first : first + count + 1]
    if sampled.logprobs is not None:
        first = 0
        for request in packed.logprobs:
            kept = len(token_ids[request.chunk])
            span = slice(first, first + kept)
            logprobs[request.chunk] = sampled.logprobs.read(span, request.num_top)
            first += request.count
    for request, blocks in zip(packed.prompt_logprobs, sampled.prompt_logprobs, strict=True):
        prompt_logprobs[request.chunk] = [
            entry for block in blocks for entry in block.read(slice(None), request.num_top)
        ]
    return StepOutput(
        step=packed.batch.step,
        token_ids=token_ids,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        seconds=step.seconds,
        spans=device_spans,
    )


def plan_on_one_thread() -> None:
    """Have torch use one core in the calling thread, which plans beside a CPU stream.

    A second thread with a parallel team of its own would halve the speed of the stream's.
    """
    torch.set_num_threads(1)
    torch.get_num_threads()  # fixes it for this thread, whatever others set later
