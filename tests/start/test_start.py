"""A start as on a GPU: graphs of few sizes, captured before serving, and nothing but their
operations left when they are replayed.

Played on a CPU, whose own starts capture nothing: what runs on a GPU alone is run here.
"""

import subprocess
import sys
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from minisgl.build import BUNDLED_MODEL
from minisgl.config import EngineConfig
from minisgl.core.batch import Batch
from minisgl.core.executor import GrammarMasks
from minisgl.core.request import SamplingParams
from minisgl.core.speculation import Speculation, propose_on_device
from minisgl.device import CpuDevice
from minisgl.kernels.op import Op
from minisgl.start.facts import read_facts
from minisgl.start.load import load_worker
from minisgl.step.executor import LocalExecutor
from tests.world.requests import mixed_requests
from tests.world.tiny import serve

ROWS, VOCAB = 6, 2048  # of the bundled model


class Tape(TorchDispatchMode):
    """Takes down operations on tensors; an op of ours as one, whatever it is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[list[tuple]] = [[]]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.note(function, args, kwargs or {})

    def note(self, function, args, kwargs):
        with _disable_current_modes():
            result = function(*args, **kwargs)
        self.pieces[-1].append((function, args, kwargs, result))
        return result


class Recording:
    """Run once, then taken down; a replay writes where the capture wrote."""

    def __init__(self, device: "Captures", function: Callable[..., object]) -> None:
        device.captured += 1
        function(lambda call: None)
        self.tape, self.calls = Tape(), []

        def cut(call):
            self.calls.append(call)
            self.tape.pieces.append([])

        device.tape = self.tape
        with self.tape:
            function(cut)
        device.tape = None

    def replay(self, *args: object) -> None:
        for piece, call in zip_longest(self.tape.pieces, self.calls):
            for function, given, named, made in piece:
                result = function(*given, **named)
                for there, now in zip(tree_leaves(made), tree_leaves(result), strict=True):
                    if isinstance(now, torch.Tensor) and there.data_ptr() != now.data_ptr():
                        there.copy_(now)
            if call is not None:
                call(*args)


class Captures(CpuDevice):
    """A CPU whose graphs are made as a GPU's are."""

    captures = True
    captured = 0
    tape: Tape | None = None

    def row_multiple(self, dtype: torch.dtype) -> int:
        return 1

    def capture(self, function: Callable[[], object]) -> Any:
        return Recording(self, lambda cut: function())

    def capture_pieces(self, function: Callable[..., object]) -> Any:
        return Recording(self, function)


def load(device: CpuDevice, **options: Any) -> LocalExecutor:
    config = EngineConfig(
        dtype="float32",
        max_running_requests=ROWS,
        max_total_tokens=2048,
        chunked_prefill_size=48,
        **options,
    )
    return LocalExecutor(load_worker(read_facts(config, BUNDLED_MODEL, device), device))


def mask_all(batch: Batch) -> GrammarMasks:
    """Every token allowed, for the first chunk that samples, if there is one."""
    indices = [i for i, chunk in enumerate(batch.chunks) if chunk.samples][:1]
    return GrammarMasks(indices, np.full((len(indices), VOCAB // 32), 2**32 - 1, np.uint32))


DRAFTS = {"speculative_algorithm": "draft", "speculative_draft_model": "tiny-draft"}
BARE = {"temperature": 0.0, "max_tokens": 12}
IN_PIECES = {"piecewise_cuda_graph_max_tokens": 64, "cascade_min_shared_tokens": 1}


@pytest.mark.parametrize(
    "options",
    [
        {},
        IN_PIECES,
        *(DRAFTS | IN_PIECES | {"speculative_num_draft_tokens": count} for count in (1, 2, 4)),
    ],
    ids=str,
)
def test_a_start_as_on_a_gpu_serves_as_one_without_graphs(monkeypatch, options):
    # Steps with log-probabilities are sampled eagerly, those with plain requests alone in the
    # plain second half.
    requests = sorted(mixed_requests(12, seed=3), key=lambda r: r.params.logprobs is not None)
    bare = [r for r in requests if r.params == SamplingParams(**BARE, seed=r.params.seed)]
    assert len(bare) > 1
    plain = load(CpuDevice(num_threads=1), disable_cuda_graph=True)
    expected = [serve(plain, wanted).tokens for wanted in (requests, bare)]
    plain.close()
    device, call = Captures(num_threads=1), Op.__call__

    def taken_down(op, *args, **kwargs):
        tape = device.tape
        if tape is None:
            return call(op, *args, **kwargs)
        device.tape = None  # an op may call others
        result = tape.note(lambda *a, **k: call(op, *a, **k), args, kwargs)
        device.tape = tape
        return result

    monkeypatch.setattr(Op, "__call__", taken_down)
    executor = load(device, **options)
    captured = device.captured
    assert captured >= 4 * 4  # sizes 1, 2, 4 and 8: a first half and three second ones
    speculation = None
    if "speculative_algorithm" in options:
        count = options["speculative_num_draft_tokens"]
        speculation = Speculation(propose_on_device, count, on_device=True)
    config = EngineConfig(
        chunked_prefill_size=48,
        cascade_min_shared_tokens=options.get("cascade_min_shared_tokens"),
    )
    served = [
        serve(executor, wanted, config=config, speculation=speculation)
        for wanted in (requests, bare)
    ]
    assert [result.tokens for result in served] == expected
    assert serve(executor, bare, config=config, masks=mask_all).tokens == expected[1]
    executor.close()
    assert device.captured == captured  # none while serving
    if speculation is not None:
        assert speculation.num_drafts > 50


def test_no_start_loads_a_compiler() -> None:
    """torch's own, and the algebra that it needs: seconds and a hundred megabytes on a CPU."""
    script = """
import sys
from minisgl import LLM, SamplingParams
with LLM(device="cpu", speculative_algorithm="ngram", max_total_tokens=2048) as llm:
    llm.generate(["Hello"] * 3, SamplingParams(max_tokens=8), use_tqdm=False)
print(sorted({"torch._dynamo", "torch._inductor", "sympy", "triton"} & {*sys.modules}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
