"""Every GPU implementation on every card's cases, in every dtype, against the float64 reference."""

import pytest
import torch

from minisgl.kernels.config import target
from minisgl.kernels.op import Case, Op, all_ops
from tests.kernels.cards import check, tensors

NOT_INTERPRETED = {"hopper"}  # Gluon: only the compile gate and a GPU see it
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _dtypes(case: Case) -> tuple[torch.dtype, ...]:
    """All of them, or one where the case's arguments do not depend on it."""
    made = [
        case.make(torch.device("cpu"), dtype, torch.Generator().manual_seed(0))
        for dtype in DTYPES[:2]
    ]
    kinds = [[tensor.dtype for _, tensor in tensors("", arguments)] for arguments in made]
    return DTYPES if kinds[0] != kinds[1] else DTYPES[:1]


def _parameters():
    for op in all_ops():
        for implementation in op.implementations:
            if implementation.device != "cuda" or implementation.name in NOT_INTERPRETED:
                continue
            if implementation.path.endswith("_reference"):
                continue
            for case in op.cases:
                for dtype in _dtypes(case):
                    label = f"{op.name}-{implementation.name}-{case.label}-{str(dtype)[6:]}"
                    yield pytest.param(op, implementation.name, case, dtype, id=label)


@pytest.mark.parametrize(("op", "name", "case", "dtype"), list(_parameters()))
def test_case(op: Op, name: str, case: Case, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    arguments = case.make(torch.device("cpu"), dtype, generator)
    with target(90):
        check(op, name, arguments)
