"""The CPU's implementations on every card's cases, recorded on one set of values and replayed on
others: what one of them reads on the host, but by a call, would be that of the first."""

from collections.abc import Iterator

import pytest
import torch

from minisgl import csrc
from minisgl.device.tape import Arena, TapeGraph
from minisgl.kernels.op import Case, Op, all_ops
from tests.kernels.cards import copied, outcome, tensors

pytestmark = pytest.mark.skipif(
    csrc.load("model_ops", wait=True) is None, reason="no compiler: nothing is recorded"
)


def _parameters() -> Iterator[object]:
    for op in all_ops():
        for case in op.cases if any(i.device == "cpu" for i in op.implementations) else ():
            for dtype in (torch.float32, torch.bfloat16):
                yield pytest.param(op, case, dtype, id=f"{op.name}-{case.label}-{str(dtype)[6:]}")


@pytest.mark.parametrize(("op", "case", "dtype"), list(_parameters()))
def test_a_replay_sees_other_values(op: Op, case: Case, dtype: torch.dtype) -> None:
    device = torch.device("cpu")
    values = [case.make(device, dtype, torch.Generator().manual_seed(seed)) for seed in range(3)]
    static = copied(values[0])
    first, *others = static
    found: dict[str, torch.Tensor] = dict(tensors("argument", static))

    def call() -> None:
        found.update(
            tensors("result", op(static[first], **{name: static[name] for name in others}))
        )

    with torch.inference_mode():
        graph = TapeGraph(call, Arena())
        for turn in values:
            for tensor in found.values():
                tensor.fill_(torch.nan if tensor.is_floating_point() else 1)
            for (_, tensor), (_, value) in zip(tensors("", static), tensors("", turn), strict=True):
                tensor.copy_(value)
            expected = outcome(op.implementation("cpu"), copied(turn))
            graph.replay()
            assert found.keys() == expected.keys()
            for name, want in expected.items():
                torch.testing.assert_close(found[name], want, rtol=0, atol=0, equal_nan=True)
