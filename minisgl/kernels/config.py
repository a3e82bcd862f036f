"""Launch configurations: one fixed table per GPU architecture. Nothing is tuned while serving.

Launchers read their tiles, warps and stages here and nowhere else, and so does the compile gate:
what is checked offline is what is launched. The numbers are chosen so that kernels compile without
spilling registers and within shared memory (`python -m tools.compile_gate`).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Tile:
    """One program's tile and how it is launched."""

    rows: int
    cols: int
    warps: int
    stages: int
    depth: int = 0  # of a matrix product's reduction


@dataclass(frozen=True)
class Architecture:
    """What the launchers need to know of a GPU generation. Attention tiles are by head size."""

    processors: int  # streaming multiprocessors assumed when work is split
    shared_bytes: int  # shared memory one block may use
    decode: Mapping[int, Tile]
    chunk: Mapping[int, Tile]
    matmul: Tile
    experts: Tile
    experts_few: Tile  # few tokens per expert
    grouped: Tile  # of weights in codes: rows of x, outputs
    grouped_few: Tile


def _by_head(small: Tile, medium: Tile, large: Tile) -> dict[int, Tile]:
    return {64: small, 128: medium, 256: large}


ARCHITECTURES: Mapping[int, Architecture] = {
    80: Architecture(
        processors=108,
        shared_bytes=163 * 1024,
        decode=_by_head(Tile(16, 64, 4, 3), Tile(16, 64, 4, 3), Tile(16, 32, 4, 3)),
        chunk=_by_head(Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 32, 8, 3)),
        matmul=Tile(128, 128, 8, 3, depth=64),
        experts=Tile(64, 128, 4, 3, depth=64),
        experts_few=Tile(16, 128, 4, 4, depth=64),
        grouped=Tile(128, 128, 8, 3),
        grouped_few=Tile(16, 64, 4, 4),
    ),
    89: Architecture(
        processors=128,
        shared_bytes=99 * 1024,
        decode=_by_head(Tile(16, 64, 4, 3), Tile(16, 64, 4, 3), Tile(16, 32, 4, 3)),
        chunk=_by_head(Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(64, 16, 8, 3)),
        matmul=Tile(128, 128, 8, 3, depth=32),
        experts=Tile(64, 128, 4, 3, depth=32),
        experts_few=Tile(16, 128, 4, 4, depth=64),
        grouped=Tile(128, 128, 8, 3),
        grouped_few=Tile(16, 64, 4, 4),
    ),
    90: Architecture(
        processors=132,
        shared_bytes=227 * 1024,
        decode=_by_head(Tile(16, 64, 4, 3), Tile(16, 64, 4, 3), Tile(16, 64, 4, 3)),
        chunk=_by_head(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 8, 3)),
        matmul=Tile(128, 128, 8, 4, depth=64),
        experts=Tile(64, 128, 4, 4, depth=64),
        experts_few=Tile(16, 128, 4, 4, depth=64),
        grouped=Tile(128, 64, 4, 4),
        grouped_few=Tile(16, 64, 4, 4),
    ),
    100: Architecture(
        processors=148,
        shared_bytes=227 * 1024,
        decode=_by_head(Tile(16, 64, 4, 3), Tile(16, 64, 4, 3), Tile(16, 64, 4, 3)),
        chunk=_by_head(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 8, 3)),
        matmul=Tile(128, 128, 8, 4, depth=64),
        experts=Tile(64, 128, 4, 4, depth=64),
        experts_few=Tile(16, 128, 4, 4, depth=64),
        grouped=Tile(128, 64, 4, 4),
        grouped_few=Tile(16, 64, 4, 4),
    ),
}

# Attention in fp32 multiplies without tensor cores, which takes more registers.
_FP32_ATTENTION = _by_head(Tile(32, 32, 8, 2), Tile(32, 64, 8, 1), Tile(32, 16, 8, 2))

# Compute capabilities that use a listed generation's table.
_FAMILY = {80: 80, 86: 89, 87: 89, 89: 89, 90: 90, 100: 100, 103: 100, 120: 89, 121: 89}

_invariant: ContextVar[bool] = ContextVar("batch_invariant", default=False)
_target: ContextVar[int | None] = ContextVar("target_architecture", default=None)


@contextmanager
def target(arch: int) -> Iterator[None]:
    """Within the context, launchers configure for sm_`arch` whatever device the tensors are on."""
    token = _target.set(arch)
    try:
        yield
    finally:
        _target.reset(token)


@contextmanager
def fixed_order() -> Iterator[None]:
    """Within the context, no result depends on which other sequences are in the batch."""
    token = _invariant.set(True)
    try:
        yield
    finally:
        _invariant.reset(token)


def batch_invariant() -> bool:
    """Whether launchers are within `fixed_order`."""
    return _invariant.get()


def architecture(device: torch.device) -> Architecture:
    """The table for `device`. Raises RuntimeError for a GPU that no table covers."""
    return _table(device, _target.get())


@lru_cache
def _table(device: torch.device, arch: int | None) -> Architecture:
    return table_for(capability(device) if arch is None else arch)


def capability(device: torch.device) -> int:
    """90 for an sm_90: of `target` where there is one, else of the GPU."""
    arch = _target.get()
    if arch is None:
        major, minor = torch.cuda.get_device_capability(device)
        arch = 10 * major + minor
    return arch


def table_for(capability: int) -> Architecture:
    """The table for GPUs of sm_`capability`. Raises RuntimeError where there is none."""
    if capability not in _FAMILY:
        raise RuntimeError(f"no launch configuration for sm_{capability}; known: {list(_FAMILY)}")
    return ARCHITECTURES[_FAMILY[capability]]


def attention_tile(tiles: Mapping[int, Tile], head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile for the smallest listed head size that holds `head_dim`; `tiles` are for 16 bits."""
    for size, tile in (_FP32_ATTENTION if dtype == torch.float32 else tiles).items():
        if head_dim <= size:
            return tile
    raise ValueError(f"head_dim must be at most {max(tiles)}, got {head_dim}")


def product_tile(tile: Tile, dtype: torch.dtype) -> Tile:
    """`tile` is for 16 bits: fp32 needs twice the shared memory and is loaded half as far ahead."""
    return replace(tile, stages=tile.stages // 2) if dtype == torch.float32 else tile


def row_warps(elements: int) -> int:
    """Warps of a program that holds `elements` of whole rows in registers: 16 to a thread."""
    return min(16, max(1, elements // 512))
