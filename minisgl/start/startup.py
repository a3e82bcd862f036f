"""A start: its stages timed, kernels compiled, everything run once before it is served."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import msgspec
import numpy as np
import torch
from tqdm import tqdm

from minisgl.core.batch import PENDING, Batch, CascadeGroup, Chunk, CopyJob, RowSetup
from minisgl.core.executor import GrammarMasks, Limits
from minisgl.core.request import SamplingParams
from minisgl.device import Device
from minisgl.kernels.shapes import EngineShapes
from minisgl.log import get_logger, shows_progress
from minisgl.models.decoder import Decoder
from minisgl.parallel import Communicator
from minisgl.start.kernel_shapes import model_shapes
from minisgl.step.inputs import pack_step
from minisgl.step.rows import HostRows
from minisgl.step.runner import Runner, Step
from minisgl.step.sizes import Geometry, mask_words
from minisgl.step.worker import Worker

log = get_logger(__name__)


class Stages:
    """Seconds of each stage, in the order they ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs within; a stage that comes again adds up."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    def table(self) -> str:
        """One line per stage, for the log."""
        rows = [*self.seconds.items(), ("total", sum(self.seconds.values()))]
        width = max(len(name) for name, _ in rows)
        return "\n".join(
            ["start-up:", *(f"  {name:<{width}}{took:>9.2f} s" for name, took in rows)]
        )


class Kernels:
    """The kernels that this process compiles: on a GPU, all of them ahead of serving."""

    def __init__(self, device: Device) -> None:
        """From now on what is compiled is counted."""
        self._device = device
        self._before = 0
        self._counter = None
        if device.torch_device.type == "cuda":
            from minisgl.kernels.warmup import CompileCounter  # imports Triton

            self._counter = CompileCounter()
            self._counter.install()

    def ready(self) -> None:
        """From now on, what is compiled has been missed."""
        self._before = self._total()

    def missed(self) -> int:
        """How many were compiled since `ready`; those found in the cache on disk count, too."""
        return self._total() - self._before

    def _total(self) -> int:
        return 0 if self._counter is None else self._counter.total

    def build(self, model: Decoder, engine: EngineShapes, comm: Communicator) -> None:
        """Compile what serving `model` can need in parallel processes, and load it here.

        Rank 0 compiles, and the others find it on disk. RuntimeError where a kernel does not
        compile.
        """
        if self._counter is None:
            return
        from minisgl.kernels.config import table_for
        from minisgl.kernels.warmup import compile_ahead, load, serving_launches

        major, minor = torch.cuda.get_device_capability(self._device.torch_device)
        arch, shapes = 10 * major + minor, model_shapes(model)
        if comm.rank == 0:
            compiled = compile_ahead(shapes, engine, arch)
            log.info("compiled %d kernels for sm_%d; the others were on disk", compiled, arch)
        self._device.run(lambda: comm.broadcast(self._device.zeros((1,), torch.int32)))
        launches = serving_launches(shapes, engine, table_for(arch))
        self._device.run(load, launches, arch)


def make_ready(
    worker: Worker, stages: Stages, *, cascade: bool, prompt_tokens: int, num_drafts: int
) -> int:
    """Run what steps can ask for, and capture all graphs where the device captures.

    prompt_tokens: of a step, at most, beside rows with up to `num_drafts` drafts; where graphs are
    captured such a step is run last. Returns the bytes that capturing took.
    """
    device, runner = worker.device, worker.runner
    limits, geometry = worker.limits, worker.geometry
    everything = device.captures
    with stages.stage("warm up"):
        device.run(
            lambda: warm_up(runner, limits, geometry, cascade=cascade, everything=everything)
        )
    if not device.captures:  # where it costs nothing, graphs are made when they are first needed
        return 0
    taken = device.run(_capture, worker, stages, cascade) if runner.graphs else 0
    with stages.stage("largest step"):
        device.run(run_largest, runner, limits, geometry, prompt_tokens, num_drafts)
        device.record().wait()
    return taken


def _capture(worker: Worker, stages: Stages, cascade: bool) -> int:
    """Every graph, in the stream; the bytes that this took."""
    runner, free = worker.runner, worker.device.memory().free
    if runner.draft is not None:
        with stages.stage("capture the draft model"):
            runner.draft.capture()
    with stages.stage("capture graphs"):
        for decode in runner.graphs.values():
            decode.capture(_progress, cascade=cascade)
        for tokens in _progress(worker.geometry.piece_sizes[::-1]):
            capture_pieces(runner, worker.limits, worker.geometry, tokens)
    return free - worker.device.memory().free


def _progress(sizes: Sequence[int]) -> Iterable[int]:
    hidden = not shows_progress()
    bar: Iterable[int] = tqdm(
        sizes, desc="capturing graphs", unit="size", leave=False, disable=hidden
    )
    return bar


def warm_up(
    runner: Runner, limits: Limits, geometry: Geometry, *, cascade: bool, everything: bool
) -> None:
    """Run prompts and mixed steps on the padding row, in the stream.

    With `everything` that can be asked of them, too, so that no request is the first to load what
    it needs. Padding is left greedy: the cheapest to sample.
    """
    row = limits.max_rows
    host = HostRows(limits.max_rows, limits.vocab_size, ())
    asking = SamplingParams(
        seed=0, frequency_penalty=0.1, logit_bias=((0, 1.0),), logprobs=1, prompt_logprobs=1
    )
    greedy = SamplingParams(seed=0, temperature=0.0)
    setups = [RowSetup(0, 0, row, 0, 2, params, [0, 0]) for params in (asking, greedy)]
    prompt = Chunk(0, 0, row, 0, 2, [0, 0], 0, [0], True)
    decode = Chunk(0, 0, row, 1, 1, [], 0, [], True)
    drafted = Chunk(0, 0, row, 1, 2, [], 0, [], True, [0])
    batches = [
        Batch(0, [prompt], 0, setups[:1], [CopyJob(0, 0, 0)]),
        Batch(1, [drafted, prompt], 1),
        Batch(2, [prompt], 0, setups[1:]),
        Batch(3, [decode, prompt], 1),
    ]
    if cascade:
        after = Chunk(0, 0, row, limits.page_size, 1, [0], 0, [0, 0], True)
        batches.append(Batch(4, [after], 1, cascade_groups=[CascadeGroup(0, 1, 1)]))
    if geometry.num_drafts:
        follows = msgspec.structs.replace(prompt, samples=False)
        drafts = [PENDING] * geometry.num_drafts
        proposed = Chunk(0, 0, row, 0, 1 + len(drafts), [], 0, [], True, drafts)
        batches.append(Batch(5, [proposed], 1, draft_chunks=[follows]))
    bits = np.full((1, mask_words(limits.vocab_size)), 2**32 - 1, np.uint32)
    eager = replace(geometry, decode_sizes={}, staging=0, piece_sizes=())
    for batch in batches if everything else batches[2:]:
        step = Step(pack_step(batch, host, eager))
        runner.forward(step)
        runner.sample(step, None if batch.step else GrammarMasks([0], bits))


def capture_pieces(runner: Runner, limits: Limits, geometry: Geometry, tokens: int) -> None:
    """Have the piecewise graphs of so many tokens captured, on the padding row."""
    runner.forward(_padding_step(limits, geometry, [], tokens))


def run_largest(
    runner: Runner, limits: Limits, geometry: Geometry, prompt_tokens: int, num_drafts: int
) -> None:
    """Run the largest step there can be, on the padding row: every row with `num_drafts` drafts,
    and `prompt_tokens` more.

    What it takes of the device's memory is then taken before serving, or the start fails.
    """
    drafts = [0] * num_drafts
    decode = Chunk(0, 0, limits.max_rows, 1, 1 + num_drafts, [], 0, [], True, drafts)
    step = _padding_step(limits, geometry, [decode] * limits.max_rows, prompt_tokens)
    runner.forward(step)
    runner.sample(step, None)


def _padding_step(
    limits: Limits, geometry: Geometry, decoding: list[Chunk], prompt_tokens: int
) -> Step:
    """A step of these chunks and of prompts, all on the padding row."""
    row = limits.max_rows
    longest = min(prompt_tokens, limits.max_context)
    lengths = [longest] * (prompt_tokens // longest)
    if prompt_tokens % longest:
        lengths.append(prompt_tokens % longest)
    prompts = [Chunk(0, 0, row, 0, n, [0] * n, 0, [], True) for n in lengths]
    host = HostRows(limits.max_rows, limits.vocab_size, ())
    return Step(pack_step(Batch(0, decoding + prompts, len(decoding)), host, geometry))
