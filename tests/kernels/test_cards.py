"""Every GPU implementation on every card's cases, in every dtype, against the float64 reference."""

import pytest
import torch

from minisgl.kernels.config import target
from minisgl.kernels.op import Case, Op
from tests.kernels.cards import all_ops, check

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _parameters():
    for op in all_ops():
        for implementation in op.implementations:
            if implementation.device != "cuda" or implementation.path.endswith("_reference"):
                continue
            for case in op.cases:
                for dtype in DTYPES:
                    label = f"{op.name}-{implementation.name}-{case.label}-{str(dtype)[6:]}"
                    yield pytest.param(op, implementation.name, case, dtype, id=label)


@pytest.mark.parametrize(("op", "name", "case", "dtype"), list(_parameters()))
def test_case(op: Op, name: str, case: Case, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    with target(90):
        check(op, name, case.make(torch.device("cpu"), dtype, generator))
