"""Every GPU implementation on every card's cases, on the GPU itself, against float64."""

import pytest
import torch

pytest.importorskip("triton")

from minisgl.kernels.config import target
from minisgl.kernels.op import Case, Implementation, Op, all_ops
from tests.gpu.conftest import stand_ins
from tests.kernels.cards import check

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

pytestmark = pytest.mark.gpu


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case in every type, the first cases of all in bf16 first: what a run that is cut has
    seen is something of every kernel. Where the GPU is played, the first in float32 alone."""
    option, played = metafunc.config.getoption, stand_ins(metafunc.config)
    only, without = option("--only", None), option("--without", None)
    listed = [
        (DTYPES.index(dtype), number, op, implementation, case, dtype)
        for op in all_ops()
        for implementation in op.implementations
        if implementation.device == "cuda"
        if implementation.name == only or (only is None and implementation.name != without)
        for number, case in enumerate(op.cases[:1] if played else op.cases)
        for dtype in (DTYPES[-1:] if played else DTYPES)
    ]
    listed.sort(key=lambda item: (item[1] > 0, item[0], item[1]))
    cases = [
        pytest.param(
            op,
            implementation,
            case,
            dtype,
            id=f"{op.name}-{implementation.name}-{case.label}-{str(dtype)[6:]}",
        )
        for _, _, op, implementation, case, dtype in listed
    ]
    metafunc.parametrize(("op", "implementation", "case", "dtype"), cases)


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
