"""Kernels without the GPU that they are for: which ones launches need, and compiling them.

Launchers are called on tensors without memory ("meta") as if those lay on an sm_N: arguments are
bound, specialised and configured exactly as when serving, and what is compiled lands in Triton's
cache on disk under the key that a launch on such a GPU looks up. Under `recorded` a launch stops
before that, and what it would have compiled is a `Variant`.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITCallable, JITFunction

from minisgl.kernels.config import target


class OfflineDriver(DriverBase):  # type: ignore[misc]
    """Stands in for a GPU driver: names a target, launches nothing."""

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self._device = object()  # whose kernels nobody knows yet

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> object:
        return self._device

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise RuntimeError("kernels are not tuned offline")


@dataclass(frozen=True, eq=False)
class Variant:
    """What one compilation of a kernel is for: an architecture, and of the kernel's arguments
    types, constants and alignment."""

    kernel: JITFunction
    arch: int
    key: str  # Triton's own: equal ones are one kernel
    _facts: tuple[Any, ...]  # signature, device, constants, options, attributes

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def facts(self) -> Mapping[str, Any]:
        """By parameter its constant, or its type as Triton writes it ("*bf16"); and `arch`."""
        signature, _, constants, *_ = self._facts
        names = list(signature)
        return {**signature, **{names[path[0]]: value for path, value in constants.items()}} | {
            "arch": self.arch
        }

    def compile(self) -> Any:
        """The compiled kernel, which is then in Triton's cache on disk."""
        with offline(self.arch):  # also where there is a GPU: its memory is not ours to take
            return self.kernel._do_compile(self.key, *self._facts, True)

    def data(self) -> str | None:
        """What `load` makes the kernel from in another process; None if Triton cannot say it."""
        said: list[str] = []

        def keep(*, compile: dict[str, Any], **_: Any) -> bool:
            said.append(compile["specialization_data"])
            return True  # so that nothing is compiled

        with patch.object(triton.knobs.runtime, "jit_cache_hook", keep):
            try:
                self.compile()
            except TypeError:  # a layout of Gluon's is no JSON
                return None
        return said[0]


def hash_in_order(module: ModuleType) -> None:
    """Hash a module's kernels as they stand in it, and what they call before them.

    Triton finds a kernel on disk by a hash that leaves out the constants of whatever it calls, if
    no kernel before it has called that: it would depend on what else a process compiles.
    """
    for value in [*vars(module).values()]:
        if isinstance(value, JITCallable) and value.hash is None:
            if value.fn.__module__ != module.__name__:
                hash_in_order(sys.modules[value.fn.__module__])
            value.cache_key  # noqa: B018


@contextmanager
def offline(arch: int) -> Iterator[None]:
    """Within the context meta tensors are taken for an sm_`arch`'s; a launch ends with its kernel
    compiled, or found, for a device that has none yet."""
    run, driver, active = JITFunction.run, triton.runtime.driver, triton.runtime.driver._active

    def stop_short(kernel: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return run(kernel, *args, **{**kwargs, "warmup": True})

    driver.set_active(OfflineDriver(arch))
    try:
        with patch.object(JITFunction, "run", stop_short), target(arch):
            yield
    finally:
        driver._active = active


@contextmanager
def recorded(arch: int) -> Iterator[dict[str, Variant]]:
    """`offline`, but nothing is compiled.

    Yields the variants launched so far, in the order of their first launches.
    """
    variants: dict[str, Variant] = {}

    def note(kernel: JITFunction, key: str, *facts: Any) -> object:
        hash_in_order(sys.modules[kernel.module])
        device, name = facts[1], f"{kernel.module}.{kernel.__name__} {key}"
        variants[name] = Variant(kernel, arch, key, facts[:-1])
        known = kernel.device_caches[device][0][key] = object()  # in place of a compiled kernel
        return known

    with offline(arch), patch.object(JITFunction, "_do_compile", note):
        yield variants
