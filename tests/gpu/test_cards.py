"""Every GPU implementation on every card's cases, on the GPU itself, against float64."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from minisgl.kernels.config import target
from minisgl.kernels.op import Case, Implementation, Op
from tests.gpu.conftest import stand_ins
from tests.kernels.cards import all_ops, check

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

pytestmark = pytest.mark.gpu


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case in every type; the first in float32 where the GPU is played."""
    option, played = metafunc.config.getoption, stand_ins(metafunc.config)
    only, without = option("--only", None), option("--without", None)
    cases = [
        pytest.param(op, implementation, case, dtype, id="-".join(label))
        for op, implementation, cases in _implementations()
        if implementation.name == only or (only is None and implementation.name != without)
        for case in (cases[:1] if played else cases)
        for dtype in (DTYPES[:1] if played else DTYPES)
        for label in [(op.name, implementation.name, case.label, str(dtype)[6:])]
    ]
    metafunc.parametrize(("op", "implementation", "case", "dtype"), cases)


def _implementations() -> Iterator[tuple[Op, Implementation, list[Case]]]:
    for op in all_ops():
        for implementation in op.implementations:
            if implementation.device == "cuda":
                yield op, implementation, list(op.cases)


@pytest.fixture(scope="session")
def interpreter(request: pytest.FixtureRequest) -> None:
    """Where the GPU is played: Triton's interpreter, mended once in this process."""
    if stand_ins(request.config):
        from tests.kernels.interpreter import repair

        repair()


@pytest.mark.usefixtures("interpreter")
def test_case(
    op: Op,
    implementation: Implementation,
    case: Case,
    dtype: torch.dtype,
    device_type: str,
    request: pytest.FixtureRequest,
) -> None:
    device, name = torch.device(device_type), implementation.name
    generator = torch.Generator(device).manual_seed(0)
    if stand_ins(request.config):
        if name == "hopper":
            pytest.skip("Gluon is not interpreted: nothing stands in for a GPU here")
        with target(90):
            check(op, name, case.make(device, dtype, generator))
        return
    if not implementation.supports(device):
        pytest.skip(f"{name} needs another GPU")
    check(op, name, case.make(device, dtype, generator))
