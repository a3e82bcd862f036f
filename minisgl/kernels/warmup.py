"""Kernels of this process: known ones loaded ahead of serving, and the others counted.

Import this module only where kernels run on a GPU: it imports Triton.
"""

import importlib
import json
from collections.abc import Iterable
from typing import Any

import triton

from minisgl.kernels.offline import hash_in_order


class CompileCounter:
    """Kernels that this process has compiled, or found on disk, since `install`."""

    def __init__(self) -> None:
        self.compiled = 0
        self.loaded = 0
        self.names: list[str] = []

    @property
    def total(self) -> int:
        """First launches of a kernel's variant: each held up a step."""
        return self.compiled + self.loaded

    def install(self) -> None:
        """Listen to Triton's compiler, beside whoever does so already."""
        before = triton.knobs.compilation.listener

        def listen(*, src: Any, cache_hit: bool, **facts: Any) -> None:
            self.compiled += not cache_hit
            self.loaded += cache_hit
            self.names.append(src.name)
            if before is not None:
                before(src=src, cache_hit=cache_hit, **facts)

        triton.knobs.compilation.listener = listen


def load(variants: Iterable[str]) -> None:
    """Find these `Variant.data` on disk, or compile them, and load them on this process's GPU.

    Their first launches then cost no more than any other. To be called on the thread that serves.
    """
    for data in variants:
        path, _, name = json.loads(data)["name"].rpartition(".")
        module = importlib.import_module(path)
        hash_in_order(module)
        kernel = getattr(module, name).preload(data)
        kernel._init_handles()
