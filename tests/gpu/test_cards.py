"""Every GPU implementation on every card's cases, on the GPU itself, against float64."""

import pytest
import torch

from minisgl.kernels.op import Case, Op
from tests.kernels.cards import all_ops, check

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.gpu


def _parameters():
    for op in all_ops():
        for implementation in op.implementations:
            if implementation.device == "cuda":
                for case in op.cases:
                    for dtype in DTYPES:
                        label = f"{op.name}-{implementation.name}-{case.label}-{str(dtype)[6:]}"
                        yield pytest.param(op, implementation.name, case, dtype, id=label)


@pytest.mark.parametrize(("op", "name", "case", "dtype"), list(_parameters()))
def test_case(op: Op, name: str, case: Case, dtype: torch.dtype):
    device = torch.device("cuda")
    if not next(i for i in op.implementations if i.name == name).supports(device):
        pytest.skip(f"{name} needs another GPU")
    generator = torch.Generator(device).manual_seed(0)
    check(op, name, case.make(device, dtype, generator))
