"""A step never makes the host wait for the device: nothing in it depends on a tensor's content.

On a CPU nothing waits, so what would wait on a GPU is looked for among the operations.
"""

from dataclasses import replace
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from minisgl.core.batch import PENDING, Batch, CascadeGroup, Chunk, RowSetup
from minisgl.core.executor import GrammarMasks
from minisgl.core.request import SamplingParams
from minisgl.kernels.attention import attention
from minisgl.kernels.cascade import cascade
from minisgl.kernels.decode import decode
from minisgl.kernels.op import forced
from minisgl.kernels.qkv_prepare import qkv_prepare
from minisgl.step.inputs import pack_step
from minisgl.step.runner import Step
from tests.world.configs import VOCAB
from tests.world.tiny import make_executor, tiny_decoder

# Kernels have implementations for each device; their references keep to the same rule.
OPS = ("sample", "adjust_logits", "mask_logits")
OPS += ("prepare_inputs", "prepare_points", "accept_and_advance")
OPS += ("prepare_proposals", "keep_proposals")
LAYER_OPS = ("embedding", "linear", "rmsnorm", "silu_and_mul", "cap_logits")
STAND_INS = (attention, decode, cascade, qkv_prepare)


class NoHostSync(TorchDispatchMode):
    """Raises where the host would wait for a GPU: to read a value, to size a result by one, or to
    copy from memory that is not pinned."""

    READS = ("item", "_local_scalar_dense", "is_nonzero", "equal", "allclose")
    SIZED_BY_DATA = ("nonzero", "masked_select", "bincount", "repeat_interleave")
    FROM_THE_HOST = ("lift_fresh",)  # torch.tensor([...])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        refused = (*self.READS, *self.SIZED_BY_DATA, *self.FROM_THE_HOST)
        if name in refused or "unique" in name:
            raise AssertionError(f"{name} synchronises")
        if name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            raise AssertionError("indexing by a mask synchronises")
        with self:  # an operation made of others is judged by those
            parts = function.decompose(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {})) if parts is NotImplemented else parts


class Blind:
    """A model whose every operation may run ahead of the host."""

    fault = None

    def forward(self, inputs):
        if self.fault is not None:
            self.fault(inputs.positions)
        return inputs.positions[:, None].float().repeat(1, 4)

    def logits(self, hidden):
        return torch.cos(hidden[:, :1] * torch.arange(VOCAB))


def _reads(tensor, *_, **__):
    raise AssertionError("the host reads a tensor: that synchronises")


def steps() -> list[tuple[Batch, GrammarMasks | None]]:
    """Setups, patches, copies, all of sampling, drafts, masks, both kinds of log-probabilities."""
    params = SamplingParams(
        top_k=5, top_p=0.9, min_p=0.01, frequency_penalty=0.3, logit_bias={3: 1.0}, logprobs=2
    )
    plain = SamplingParams(temperature=0.0, prompt_logprobs=1, seed=2)
    penalized = SamplingParams(presence_penalty=0.5, seed=3)
    setups = [
        RowSetup(0, 0, 0, 0, 3, params, [3, 4, 5]),
        RowSetup(1, 0, 1, 0, 3, plain, [6, 7, 8]),
        RowSetup(2, 0, 2, 0, 3, penalized, [9, 9, 9]),
    ]
    prompts = [
        Chunk(uid, 0, uid, 0, 3, setup.token_ids, 0, [1 + uid], True)
        for uid, setup in enumerate(setups)
    ]

    def decoding(uid: int, start: int, drafts: list[int], pages: tuple[int, ...] = ()) -> Chunk:
        length = 1 + len(drafts)
        return Chunk(uid, 0, uid, start, length, [], 1, list(pages), True, drafts)

    both = CascadeGroup(0, 2, 1)
    every = np.full((3, 2), 2**32 - 1, np.uint32)
    return [
        (Batch(0, prompts, 0, setups), None),
        (Batch(1, [decoding(0, 3, [4, 4]), decoding(1, 3, [])], 2), GrammarMasks([0, 0, 0], every)),
        (Batch(2, [decoding(1, 4, [], (5,)), decoding(2, 4, [])], 2), None),
        (Batch(3, [decoding(2, 5, [1])], 1), None),
        (Batch(4, [decoding(2, 6, []), prompts[0]], 1), GrammarMasks([1], every[:1])),
        (Batch(5, [decoding(1, 5, []), decoding(2, 7, [])], 2), GrammarMasks([0], every[:1])),
        (Batch(6, [decoding(1, 6, []), decoding(2, 8, [])], 2, cascade_groups=[both]), None),
    ]


def drafting_steps() -> list[tuple[Batch, GrammarMasks | None]]:
    """A draft model follows a prompt, proposes for two rows, catches up, proposes along masks."""
    asked = SamplingParams(presence_penalty=0.5, seed=3), SamplingParams(logprobs=1, seed=4)
    setups = [RowSetup(i, 0, i, 0, 3, params, [9, 9, 9]) for i, params in enumerate(asked)]
    prompts = [Chunk(i, 0, i, 0, 3, [9, 9, 9], 0, [1 + i], True) for i in range(2)]
    follow = [msgspec.structs.replace(prompt, samples=False) for prompt in prompts]

    def decoding(uid: int, start: int, count: int) -> Chunk:
        return Chunk(uid, 0, uid, start, 1 + count, [], 0, [], True, [PENDING] * count)

    late = Chunk(1, 0, 1, 3, 1, [9], 0, [], False)
    every = np.full((3, 2), 2**32 - 1, np.uint32)
    return [
        (Batch(0, prompts, 0, setups, draft_chunks=follow), None),
        (Batch(1, [decoding(0, 3, 3), decoding(1, 3, 1)], 2), None),
        (Batch(2, [decoding(0, 4, 2), prompts[1]], 1, draft_chunks=[late]), None),
        (Batch(3, [decoding(0, 5, 2)], 1), GrammarMasks([0, 0, 0], every)),
    ]


def run_steps(monkeypatch, fault=None, model=None, ops=OPS, batches=None, **facts) -> list[int]:
    """Run every step under the guard, `fault` inside the model. How often each one uploads."""
    model = model or Blind()
    executor = make_executor(model, **facts)
    worker = executor.worker
    runner, device = worker.runner, worker.device
    upload, zeros, numpy, uploads = device.upload, device.zeros, torch.Tensor.numpy, []

    def unguarded_upload(*args):
        uploads[-1] += 1
        with _disable_current_modes(), monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "numpy", numpy)
            return upload(*args)

    def unguarded_zeros(*args):  # made once
        with _disable_current_modes():
            return zeros(*args)

    def run() -> None:
        with forced(dict.fromkeys(ops, "reference")), NoHostSync(), monkeypatch.context() as patch:
            patch.setattr(device, "upload", unguarded_upload)
            patch.setattr(device, "zeros", unguarded_zeros)
            # What is looked at is what a graph does, not how a CPU's is made.
            patch.setattr(device, "capture", lambda call: SimpleNamespace(replay=call))
            for name in ("tolist", "numpy", "cpu"):  # not seen by the dispatcher
                patch.setattr(torch.Tensor, name, _reads)
            for batch, masks in batches or steps():
                uploads.append(0)
                step = Step(pack_step(batch, worker.host_rows, worker.geometry))
                runner.forward(step)
                runner.sample(step, masks)

    model.fault = fault  # the guard is not up while it is warmed up
    try:
        device.run(run)
    finally:
        executor.close()
    return uploads


@pytest.mark.parametrize(
    "facts",
    [{"graphs": False}, {}, {"graph_widths": (1, 2, 3)}, {"most_in_pieces": 16}],
    ids=str,
)
def test_a_step_never_waits_for_the_device(monkeypatch, facts):
    uploads = run_steps(monkeypatch, **facts)
    # Masks are filled while the forward pass runs; everything else comes at once before it.
    assert uploads == [1 if masks is None else 2 for _, masks in steps()]


@pytest.mark.parametrize("facts", [{"graphs": False}, {"graph_widths": (1, 4)}], ids=str)
def test_nor_does_one_with_a_draft_model(monkeypatch, facts):
    """Proposals are made, put into the step and verified without a word to the host."""
    batches = drafting_steps()
    uploads = run_steps(monkeypatch, batches=batches, draft=Blind(), **facts)
    assert uploads == [1 if masks is None else 2 for _, masks in batches]


@pytest.mark.parametrize(
    "facts", [{"graphs": False}, {"graphs": True}, {"most_in_pieces": 16}], ids=str
)
def test_nor_do_a_models_layers(monkeypatch, facts):
    """Everything around attention, whose kernels read lengths and tables on the device."""

    def attend(q, *_, out=None, **__):
        return q.clone() if out is None else out.copy_(q)

    def prepare(qkv, positions, cos_sin, k_pool, v_pool, slots, num_heads, *_, out):
        q = qkv[:, : num_heads * k_pool.shape[2]].unflatten(1, (num_heads, -1)).contiguous()
        return q if out is None else out.copy_(q)

    for op, stand_in in zip(STAND_INS, (attend, attend, attend, prepare), strict=True):
        monkeypatch.setattr(op, "reference", stand_in)
    model = tiny_decoder()
    model.config = replace(model.config, logit_softcap=30.0)
    run_steps(
        monkeypatch,
        None,
        model,
        (*OPS, *LAYER_OPS, *(op.name for op in STAND_INS)),
        **facts,
    )


FAULTS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: 1 if x.sum() > 0 else 0,
    "int": lambda x: int(x[0]),
    "iteration": lambda x: [int(value) for value in x],
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "to the host": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "by a mask": lambda x: x[x > 0],
    "write by a mask": lambda x: x.clone().__setitem__(x > 0, x[:1]),
    "selected": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.repeat_interleave(x),
    "equal": lambda x: torch.equal(x, x),
    "counted": lambda x: torch.bincount(x),
    "from a list": lambda x: torch.tensor([1, 2, 3]),
}


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_wait_is_seen(monkeypatch, name, graphs):
    with pytest.raises(AssertionError, match="synchronises"):
        run_steps(monkeypatch, FAULTS[name], graphs=graphs)
