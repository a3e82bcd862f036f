"""Start-up: times its stages, compiles kernels, runs everything once before requests are served."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import torch

from minisgl import csrc
from minisgl.core.batch import PENDING, Batch, CascadeGroup, Chunk, CopyJob, RowSetup
from minisgl.core.executor import GrammarMasks, Limits
from minisgl.core.request import SamplingParams
from minisgl.device import Device
from minisgl.device.tape import calls_noted
from minisgl.layers.weights import Forms
from minisgl.log import get_logger
from minisgl.models.loader import progress
from minisgl.parallel import Communicator
from minisgl.start.facts import Facts
from minisgl.step.inputs import pack_step
from minisgl.step.rows import HostRows
from minisgl.step.runner import Step
from minisgl.step.sizes import mask_words
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
    """Compiles kernels before serving, and counts what is compiled later. Does nothing on a CPU."""

    def __init__(self, device: Device) -> None:
        """Starts counting."""
        self._device = device
        self._before = 0  # serving began
        self._counter = None
        if device.torch_device.type == "cuda":
            from minisgl.kernels.warmup import CompileCounter  # imports Triton

            self._counter = CompileCounter()
            self._counter.install()

    def ready(self) -> None:
        """Serving begins: a kernel compiled from now on was missed."""
        self._before += self.missed()

    def missed(self) -> int:
        """Kernels compiled since `ready`, or loaded from the cache on disk."""
        return 0 if self._counter is None else self._counter.total - self._before

    def build(
        self,
        facts: Facts,
        limits: Limits,
        comm: Communicator,
        forms: Sequence[Sequence[Forms]] = ((), ()),
    ) -> None:
        """Compile what serving can need in parallel processes, and load it here.

        forms: of the blocks of the model and of the draft model.
        Rank 0 compiles, and the others find it on disk. RuntimeError where a kernel does not
        compile.
        """
        if self._counter is None:
            return
        from minisgl.kernels.warmup import load
        from minisgl.start.launches import Start, compile_ahead

        major, minor = torch.cuda.get_device_capability(self._device.torch_device)
        start = Start.of(facts, limits, 10 * major + minor, comm.rank, forms)
        compiled, variants = compile_ahead(start, None if comm.rank == 0 else 0)
        if comm.rank == 0:
            log.info("compiled %d kernels for sm_%d; the others were on disk", compiled, start.arch)
        # Read, so that the host waits: a GPU's stream alone would not keep it from compiling, too.
        self._device.run(lambda: comm.broadcast(self._device.zeros((1,), torch.int32)).item())
        self._device.run(load, variants)


def make_ready(worker: Worker, facts: Facts, stages: Stages) -> int:
    """Run every kind of step once; where the device captures graphs, capture all of them.

    There the largest step is run last: every row with all its drafts, and as many tokens of prompts
    as there can be. Returns the bytes that capturing took.
    """
    device, num_drafts = worker.device, facts.config.num_draft_tokens
    widths = (1, 1 + num_drafts) if num_drafts and device.captures else (1,)
    with stages.stage("warm up"):
        device.run(warm_up, worker, widths, facts.cascade, device.captures)
    if not device.captures:  # where it costs nothing, graphs are made when they are first needed
        return 0
    taken = device.run(_capture, worker, stages, facts.cascade) if worker.runner.graphs else 0
    with stages.stage("largest step"):
        device.run(run_largest, worker, facts.config.chunked_prefill_size, num_drafts)
        device.record().wait()
    return taken


def _capture(worker: Worker, stages: Stages, cascade: bool) -> int:
    """Capture every graph, in the stream. Returns the bytes that this took."""
    runner, free = worker.runner, worker.device.free_memory()
    if runner.draft is not None:
        with stages.stage("capture the draft model"):
            runner.draft.capture()
    shown = partial(progress, what="capturing graphs", unit="size")
    with stages.stage("capture graphs"):
        for decode in runner.graphs.values():
            decode.capture(shown, cascade=cascade)
        for tokens in shown(worker.geometry.piece_sizes[::-1]):
            capture_pieces(worker, tokens)
    return free - worker.device.free_memory()


def warm_up(worker: Worker, widths: Iterable[int], cascade: bool, everything: bool) -> None:
    """Run prompts and mixed steps on the padding row, in the stream.

    widths: tokens of a decoding sequence. `everything`: with penalties, log-probabilities and
    masks, too, so that no request is the first to load what it needs. On a CPU the log then names
    what of these steps is computed through Python, if there is such.
    """
    limits, runner = worker.limits, worker.runner
    host = HostRows(limits.max_rows, limits.vocab_size)
    eager = replace(worker.geometry, decode_sizes={}, staging=0, piece_sizes=())
    steps, row = [*kinds_of_steps(limits, widths, (0, 1), everything=everything)], limits.max_rows
    if cascade:
        after = Chunk(0, 0, row, limits.page_size, 1, [0], 0, [0, 0], True)
        steps.append((Batch(0, [after], 1, cascade_groups=[CascadeGroup(0, 1, 1)]), None))
    if eager.num_drafts:
        pending = [PENDING] * eager.num_drafts
        follows = Chunk(0, 0, row, 0, 2, [0, 0], 0, [0], False)
        proposed = Chunk(0, 0, row, 0, 1 + len(pending), [], 0, [], True, pending)
        steps.append((Batch(0, [proposed], 1, draft_chunks=[follows]), None))
    native = csrc.loaded("model_ops") if worker.device.torch_device.type == "cpu" else None
    with calls_noted() as calls:
        for batch, masks in steps:
            step = Step(pack_step(batch, host, eager))
            runner.forward(step)
            runner.sample(step, masks)
    if calls and native:
        shown = f"for {native.LEVEL} and are called through Python: {', '.join(sorted(calls))}"
        log.info("some ops of a step have no native form %s", shown)


def kinds_of_steps(
    limits: Limits, widths: Iterable[int], counts: Sequence[int], *, everything: bool = True
) -> Iterator[tuple[Batch, GrammarMasks | None]]:
    """Steps of `counts` decoding sequences with `widths` tokens each, alone and with a prompt.

    With `everything` steps that use every sampling feature come first, and each is repeated with a
    mask. The padding row is left greedy: the cheapest to sample.
    """
    asking = SamplingParams(
        seed=0, frequency_penalty=0.1, logit_bias=((0, 1.0),), logprobs=1, prompt_logprobs=1
    )
    greedy = SamplingParams(seed=0, temperature=0.0)
    bits = np.full((1, mask_words(limits.vocab_size)), 2**32 - 1, np.uint32)
    every_mask = (None, GrammarMasks([0], bits)) if everything else (None,)
    for params in (asking, greedy) if everything else (greedy,):
        setups = [RowSetup(0, 0, limits.max_rows, 0, 2, params, [0, 0])]
        for width, count, prompts, masks in product(widths, counts, (0, 1), every_mask):
            if count + prompts:
                yield mixed_step(limits, width, count, prompts, setups), masks


def mixed_step(
    limits: Limits, width: int, count: int, prompts: int, setups: Sequence[RowSetup] = ()
) -> Batch:
    """`count` decoding sequences with `width` tokens each and short prompts, on the padding row."""
    row = limits.max_rows
    decode = Chunk(0, 0, row, 1, width, [], 0, [], True, [0] * (width - 1))
    prompt = Chunk(0, 0, row, 0, 2, [0, 0], 0, [0], True)
    chunks = [decode] * count + [prompt] * prompts
    return Batch(0, chunks, count, list(setups), [CopyJob(0, 0, 0)])


def capture_pieces(worker: Worker, tokens: int) -> None:
    """Capture the piecewise graphs for that many tokens, by a step on the padding row."""
    worker.runner.forward(_padding_step(worker, [], tokens))


def run_largest(worker: Worker, prompt_tokens: int, num_drafts: int) -> None:
    """Run the largest step there can be, on the padding row: every row with `num_drafts` drafts,
    and `prompt_tokens` more.

    What it takes of the device's memory is then taken before serving, or the start fails.
    """
    rows = worker.limits.max_rows
    decoding = mixed_step(worker.limits, 1 + num_drafts, rows, prompts=0).chunks
    step = _padding_step(worker, decoding, prompt_tokens)
    worker.runner.forward(step)
    worker.runner.sample(step, None)


def _padding_step(worker: Worker, decoding: list[Chunk], prompt_tokens: int) -> Step:
    """A step of these chunks and of prompts, all on the padding row."""
    limits = worker.limits
    lengths = [
        min(limits.max_context, prompt_tokens - start)
        for start in range(0, prompt_tokens, limits.max_context)
    ]
    prompts = [Chunk(0, 0, limits.max_rows, 0, n, [0] * n, 0, [], True) for n in lengths]
    host = HostRows(limits.max_rows, limits.vocab_size)
    return Step(pack_step(Batch(0, decoding + prompts, len(decoding)), host, worker.geometry))
