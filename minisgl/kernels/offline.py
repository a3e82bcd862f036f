"""Compiling kernels for a GPU that this machine need not have.

The launchers themselves are called, on tensors without memory, while a substitute driver reports an
sm_N GPU and a launch stops once its kernel is compiled. Arguments are therefore bound,
specialised and configured exactly as when serving, and what is compiled lands in Triton's cache on
disk under the key that a launch on such a GPU looks up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from minisgl.kernels.config import target


class OfflineDriver(DriverBase):  # type: ignore[misc]
    """A substitute for a GPU driver: names a target, launches nothing."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a process's compiled kernels are kept by device: one per target

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("kernels are not tuned while they are compiled offline")


@contextmanager
def compile_only(arch: int) -> Iterator[list[Any]]:
    """Within the context a launch configures for sm_`arch`, compiles for the active driver's
    device and stops; yields the compiled kernels."""
    compiled: list[Any] = []
    run = JITFunction.run

    def stop_short(kernel: JITFunction, *args: Any, **kwargs: Any) -> Any:
        result = run(kernel, *args, **{**kwargs, "warmup": True})
        result = result.result() if hasattr(result, "result") else result
        if all(result is not known for known in compiled):
            compiled.append(result)
        return result

    with patch.object(JITFunction, "run", stop_short), target(arch):
        yield compiled


@contextmanager
def offline(arch: int) -> Iterator[list[Any]]:
    """`compile_only` for an sm_`arch` that this machine need not have."""
    driver = triton.runtime.driver
    active = driver._active
    driver.set_active(OfflineDriver(arch))
    try:
        with compile_only(arch) as compiled:
            yield compiled
    finally:
        driver._active = active
