"""The kernels that serving needs, found by serving: an engine started on a GPU without memory.

The worker of a real start warms up, captures its graphs and runs its largest step on a
`MetaDevice`; what a start leaves out, mixed steps of every number of sequences and every way to
sample, is run after it. Launches are recorded and stop before anything is compiled.

`compile_ahead` has this done in parallel processes, each of which compiles its share of what it
finds into Triton's cache on disk. No GPU is needed, so it may also run where an image is built:

    python -m minisgl.start.launches < start.json
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import torch

from minisgl.config import EngineConfig
from minisgl.core.batch import Batch, CascadeGroup
from minisgl.core.executor import Limits
from minisgl.device.meta import MetaDevice
from minisgl.kernels.attention import attention
from minisgl.kernels.grouped_linear.blocks import ROW_EDGES, GroupedBlocks
from minisgl.kernels.matrix import product
from minisgl.kernels.offline import Variant, recorded
from minisgl.kernels.op import Op
from minisgl.kernels.warmup import CompileCounter
from minisgl.layers.embedding import VocabTable
from minisgl.layers.weights import Forms, Placement
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.parallel import Communicator
from minisgl.start.facts import Facts, read_facts
from minisgl.start.load import kv_shape, make_worker
from minisgl.start.startup import Stages, kinds_of_steps, make_ready, mixed_step
from minisgl.step.draft import Draft
from minisgl.step.inputs import pack_step
from minisgl.step.runner import Step
from minisgl.step.sizes import Geometry
from minisgl.step.worker import Worker

MOST_PROCESSES = 16  # a model has some fifty kernels, and each process imports torch


@dataclass(frozen=True)
class Start:
    """What decides the launches of one rank."""

    config: EngineConfig
    path: str  # of the model
    limits: Limits
    arch: int  # of the GPU, 90 for sm_90
    rank: int = 0
    forms: Sequence[Sequence[Forms]] = ((), ())

    @classmethod
    def of(
        cls,
        facts: Facts,
        limits: Limits,
        arch: int,
        rank: int,
        forms: Sequence[Sequence[Forms]] = ((), ()),
    ) -> "Start":
        config = facts.config
        if facts.draft is not None:  # already downloaded
            config = replace(config, speculative_draft_model=str(facts.draft.path.absolute()))
        return cls(config, str(facts.path.absolute()), limits, arch, rank, forms)


class OneOfMany(Communicator):
    """One rank's communicator without the others: results have the right shape, no content."""

    def gather(self, x: torch.Tensor, width: int | None = None) -> torch.Tensor:
        return torch.cat([x] * self.size, -1)[..., :width].contiguous() if self.rank == 0 else x


def launched(start: Start) -> list[Variant]:
    """What the rank can launch while it serves, in the order of first launches."""
    with recorded(start.arch) as variants:
        facts = read_facts(start.config, Path(start.path), MetaDevice(), start.rank)
        serve(facts, start.limits, start.rank, forms=start.forms)
    return list(variants.values())


def serve(
    facts: Facts,
    limits: Limits,
    rank: int = 0,
    *,
    counts: Sequence[int] = (),
    widths: Sequence[int] = (),
    forms: Sequence[Sequence[Forms]] = ((), ()),
) -> Worker:
    """Start a worker and run what is asked of it: within `recorded`, all that serving launches.

    counts: of decoding sequences in a mixed step, and widths: how many tokens each has. What is not
    given is all there can be. forms: of the blocks of the model and of the draft model.
    """
    device, num_drafts = MetaDevice(), facts.config.num_draft_tokens
    comm, draft = OneOfMany(rank, facts.config.tp_size), None

    def made(
        model: ModelConfig, comm: Communicator, attention: Op, forms: Sequence[Forms]
    ) -> Decoder:
        at = Placement(facts.dtype, device.torch_device, comm, attention)
        whole = Decoder(model, at)
        held = list(forms or (block.forms() for block in whole.blocks()))
        first, end = (whole.blocks().index(whole.layers[i]) for i in (0, -1))
        # Two layers of each kind launch what all do; of one, the first layer's would be missing.
        kinds = [*dict.fromkeys(zip(model.layers, held[first : end + 1], strict=True))] * 2
        held[first : end + 1] = [own for _, own in kinds]
        decoder = Decoder(replace(model, layers=tuple(layer for layer, _ in kinds)), at)
        for block, own in zip(decoder.blocks(), held, strict=False):
            block.take_forms(own)
        return decoder

    if facts.draft is not None:
        drafting = made(facts.draft.model, Communicator(), attention, forms[1])
        draft = Draft(drafting, kv_shape(facts, drafting), num_drafts)
    elif facts.config.speculative_algorithm == "draft":  # which rank 0 alone has
        draft = Draft(None, None, num_drafts)
    model = made(facts.model, comm, facts.attention, forms[0])
    worker = make_worker(facts, model, draft, limits, device, comm)
    make_ready(worker, facts, Stages())
    if not facts.config.batch_invariant:  # where one launch serves all numbers of rows
        for each in (model, None if draft is None else draft.model):
            device.run(_run_products, each)
    counts = counts or range(1, limits.max_rows + 1)
    _run_steps(worker, widths or range(1, 2 + num_drafts), counts, cascade=facts.cascade)
    return worker


def _run_products(model: Decoder | None) -> None:
    """Products with weights in codes of all numbers of rows that are launched in ways of their own.

    A prompt may have any of them, and so may what is scored of it.
    """
    for block, name in () if model is None else model.all_matrices():
        weight = vars(block)[name]
        if isinstance(weight, GroupedBlocks) and len(weight.shape) == 2:  # not of experts
            for rows in ROW_EDGES:
                x = weight.scales.new_empty(rows, weight.num_inputs, dtype=weight.dtype)
                wide = isinstance(block, VocabTable)
                product(x, weight, vars(block).get("bias"), wide)


def _run_steps(
    worker: Worker, widths: Sequence[int], counts: Iterable[int], *, cascade: bool
) -> None:
    """Run the kinds of steps that a start does not."""
    device, runner, limits, own = worker.device, worker.runner, worker.limits, worker.geometry
    eager = replace(own, decode_sizes={}, piece_sizes=())

    def forward(batch: Batch, geometry: Geometry) -> Step:
        step = Step(pack_step(batch, worker.host_rows, geometry))
        device.run(runner.forward, step)
        return step

    # Sizes of 1, of 16 and of what is neither tell all kinds of integers apart.
    for batch, masks in kinds_of_steps(limits, widths, (0, 1, 16)):
        for geometry in (own, eager):
            device.run(runner.sample, forward(batch, geometry), masks)
    for width, count in itertools.product(widths, counts):
        batch = mixed_step(limits, width, count, prompts=1)
        forward(batch, eager)
        if cascade:
            groups = [CascadeGroup(0, count, 1)]
            forward(msgspec.structs.replace(batch, cascade_groups=groups), eager)


def compile_ahead(start: Start, processes: int | None = None) -> tuple[int, list[str]]:
    """Compile what the rank can launch into the cache on disk, each kernel once.

    processes: by default one for each CPU core, up to MOST_PROCESSES; with 0 nothing is compiled.
    Returns how many were not on disk, and all as `kernels.warmup.load` takes them. Raises
    RuntimeError with the output of a process that fails.
    """
    if processes is None:
        processes = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    job = msgspec.json.encode(start)

    def share(part: int) -> subprocess.CompletedProcess[bytes]:
        words = [sys.executable, "-m", "minisgl.start.launches", str(part), str(processes)]
        root = Path(__file__).parents[2]  # where `-m` finds this package, installed or not
        return subprocess.run(words, input=job, capture_output=True, cwd=root, check=False)

    with ThreadPoolExecutor(max(processes, 1)) as pool:
        ended = [*pool.map(share, range(max(processes, 1)))]
    for process in ended:
        if process.returncode:
            text = process.stderr.decode(errors="replace")[-2000:]
            raise RuntimeError(f"compiling kernels for sm_{start.arch} failed:\n{text}")
    done = [json.loads(process.stdout) for process in ended]
    return sum(each["compiled"] for each in done), done[0]["variants"]


def main(words: Sequence[str]) -> int:
    """Compile the I-th of N shares, print how many were new; the first prints all variants too."""
    part, parts = map(int, words or ("0", "1"))
    variants = launched(msgspec.json.decode(sys.stdin.buffer.read(), type=Start))
    counter = CompileCounter()
    counter.install()
    for variant in variants[part::parts] if parts else ():
        variant.compile()
    said = [] if part else [data for data in map(Variant.data, variants) if data is not None]
    print(json.dumps({"compiled": counter.compiled, "variants": said}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
