"""The kernels of the all-reduce, compiled for the CPU: every path, dtype and shape, to the bit."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minisgl.csrc.build import Unavailable, find_compiler
from minisgl.kernels.all_reduce import SumPath, all_reduce_norm_reference, all_reduce_reference
from minisgl.kernels.all_reduce.peers import Peers, Segment
from tests.kernels.cards import check_floats

ROOT = Path(__file__).parents[2]
FLAGS = ("-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF_BYTES = 64 * 1024


def build(folder: Path, sources: Path) -> ctypes.CDLL:
    """The kernels of `sources` (a csrc/) as a library."""
    try:
        compiler = find_compiler("cpu")
    except Unavailable as missing:
        pytest.skip(str(missing))
    built = folder / "all_reduce.so"
    folders = ("-I", ROOT / "tests/csrc/emulated", "-I", sources)
    source = ROOT / "tests/csrc/all_reduce_emulated.cpp"
    words = [compiler, *FLAGS, "-shared", *folders, source, "-o", built]
    done = subprocess.run(words, capture_output=True, text=True)
    if "_Float16" in done.stderr:
        pytest.skip("this compiler has no _Float16")
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(built))


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    return build(tmp_path_factory.mktemp("emulated"), ROOT / "csrc")


def pointers(addresses: list[int]) -> Any:
    return (ctypes.c_void_p * len(addresses))(*addresses)


class Emulated:
    """`size` ranks whose kernels the library plays; calls are enqueued, `run` carries them out."""

    def __init__(
        self,
        library: ctypes.CDLL,
        size: int,
        *,
        blocks: int = 2,
        half_bytes: int = HALF_BYTES,
        ordered: bool = False,
        timeout: float = 60.0,
    ) -> None:
        self.library = library
        segment = Segment(library.signal_bytes(), half_bytes)
        self.memory = [_aligned(segment.num_bytes) for _ in range(size)]
        self.replicas = [_aligned(2 * half_bytes).fill_(0xFF) for _ in range(size)]
        for memory in self.memory:
            memory[segment.data_offset :] = 0xFF  # NaN: what was never published shows
        self.window = _aligned(2 * half_bytes)  # its addresses only
        self.words = [torch.zeros(1, dtype=torch.int32) for _ in range(size)]
        library.reset(
            size,
            ctypes.c_void_p(self.window.data_ptr()),
            pointers([replica.data_ptr() for replica in self.replicas]),
        )
        native = SimpleNamespace(Rank=self._rank, MAX_ROW_BYTES=library.max_row_bytes())
        self.peers = [
            Peers(
                native,
                rank,
                [memory.data_ptr() for memory in self.memory],
                _Word(self.words[rank]),
                stream=lambda: 0,
                segment=segment,
                multicast=(self.window.data_ptr(), self.replicas[rank].data_ptr()),
                ordered=ordered,
                blocks=blocks,
                timeout=timeout,
            )
            for rank in range(size)
        ]

    def _rank(self, rank, signals, data, everywhere, replica, half, word, blocks, timeout):
        """What the native module's Rank is made of, each call handed to the library instead."""

        def enqueue(path, code, norm, source, out, residual, weight, total, *facts):
            places = (source, out, residual, weight, total)
            packs, rows, width, eps, unit_offset = facts
            self.library.enqueue(
                *(int(path), code, norm, rank, len(data), blocks, pointers(signals)),
                *(pointers(data), ctypes.c_void_p(everywhere), ctypes.c_void_p(replica)),
                *(ctypes.c_int64(half), ctypes.c_void_p(word), ctypes.c_uint64(int(timeout * 1e9))),
                *(ctypes.c_void_p(place) for place in places),
                *(ctypes.c_int64(count) for count in (packs, rows, width)),
                *(ctypes.c_float(eps), int(unit_offset)),
            )

        def all_reduce(path, code, source, out, num_bytes, stream):
            enqueue(path, code, 0, source, out, 0, 0, 0, num_bytes // 16, 0, 0, 0.0, False)

        def all_reduce_norm(
            path, code, x, residual, weight, out, total, rows, row_bytes, eps, offset, stream
        ):
            sizes = (rows * row_bytes // 16, rows, row_bytes // 16)
            enqueue(path, code, 1, x, out, residual, weight, total, *sizes, eps, offset)

        return SimpleNamespace(all_reduce=all_reduce, all_reduce_norm=all_reduce_norm)

    def run(self, call: Callable[[Peers], Any]) -> list[Any]:
        """What `call` gives on every rank, once all kernels have run."""
        results = [call(peers) for peers in self.peers]
        self.library.run()
        for peers in self.peers:
            peers.check()
        return results


class _Word:
    def __init__(self, word: torch.Tensor) -> None:
        self._word = word
        self.address = word.data_ptr()

    @property
    def value(self) -> int:
        return int(self._word[0])

    @value.setter
    def value(self, value: int) -> None:
        self._word[0] = value


def _aligned(num_bytes: int) -> torch.Tensor:
    raw = torch.zeros(num_bytes + 128, dtype=torch.uint8)
    start = -raw.data_ptr() % 128
    return raw[start : start + num_bytes]


def make_parts(size: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """[size, *shape], of magnitudes that differ: another order of additions shows."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.tensor([10.0 ** (rank % 3) for rank in range(size)])
    values = torch.randn(size, *shape, generator=generator)
    return (values * scales.view(-1, *[1] * len(shape))).to(dtype)


def is_sum(found: torch.Tensor, parts: torch.Tensor, path: SumPath) -> bool:
    """To the bit; of multimem, as good as any order of additions."""
    if path is not SumPath.MULTIMEM:
        return torch.equal(found, all_reduce_reference(parts))
    bound = 2 * torch.finfo(parts.dtype).eps * parts.double().abs().sum(0)
    return bool(((found.double() - parts.double().sum(0)).abs() <= bound).all())


# One pack; less than a run of the block's threads; several runs, the last one short; many rows.
SHAPES = [(1, 8), (5, 13), (9, 1000), (70, 120)]


@pytest.mark.parametrize("path", SumPath, ids=lambda path: path.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_sums(library, size, dtype, path):
    ranks = Emulated(library, size)
    given = [make_parts(size, shape, dtype, seed) for seed, shape in enumerate(SHAPES)]
    # All calls are under way at once: each uses the half that the last but one has left.
    results = ranks.run(
        lambda peers: [peers.all_reduce(parts[peers.rank].clone(), path) for parts in given]
    )
    for sums in results:
        for parts, total, first in zip(given, sums, results[0], strict=True):
            assert is_sum(total, parts, path), (path, parts.shape)
            assert torch.equal(total, first)


def test_eight_ranks(library):
    ranks = Emulated(library, 8, blocks=1)
    parts = make_parts(8, (11, 264), torch.bfloat16, 1)
    for path in SumPath:
        for total in ranks.run(
            lambda peers, p=path: peers.all_reduce(parts[peers.rank].clone(), p)
        ):
            assert is_sum(total, parts, path), path


# Rows of one pack, of more packs than a block has threads, of less; fewer rows than blocks, more.
NORMS = [((1, 8), True), ((3, 4104), False), ((7, 72), True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "unit_offset"), NORMS)
def test_sums_with_the_norm(library, shape, unit_offset, dtype):
    size = 3
    ranks = Emulated(library, size)
    parts = make_parts(size, shape, dtype, 9)
    residual, weight = (
        make_parts(2, shape, dtype, 50)[1],
        make_parts(1, shape[1:], dtype, 51)[0],
    )
    plain, want = all_reduce_norm_reference(parts, residual, weight, 1e-6, unit_offset)
    wide = want.double()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)
    exact = exact * (weight.double() + unit_offset)
    seen = []
    for path in (SumPath.ONE_SHOT, SumPath.TWO_SHOT):
        seen += ranks.run(
            lambda peers, p=path: peers.all_reduce_norm(
                parts[peers.rank].clone(), residual, weight, 1e-6, unit_offset, p
            )
        )
    for normed, total in seen:
        assert torch.equal(total, want), shape
        assert torch.equal(normed, seen[0][0]), shape
    check_floats(str(shape), seen[0][0], plain, exact)
    by_switch = ranks.run(
        lambda peers: peers.all_reduce_norm(
            parts[peers.rank].clone(), residual, weight, 1e-6, unit_offset, SumPath.MULTIMEM
        )
    )
    for normed, total in by_switch:
        assert torch.equal(normed, by_switch[0][0])
        error = 8 * torch.finfo(dtype).eps * (parts.abs().sum(0) + residual.abs()).double()
        assert ((total.double() - want.double()).abs() <= error).all()


def test_pieces_of_a_large_call(library):
    """In the ordered mode what exceeds the buffers is cut; the kernels of the pieces overlap."""
    ranks = Emulated(library, 2, half_bytes=4096, ordered=True)
    parts = make_parts(2, (37, 120), torch.bfloat16, 4)
    residual, weight = make_parts(1, (37, 120), torch.bfloat16, 5)[0], parts[0, 0].clone()
    want = all_reduce_norm_reference(parts, residual, weight, 1e-6, False)[1]

    def call(peers: Peers):
        total = peers.all_reduce(parts[peers.rank].clone())
        return total, peers.all_reduce_norm(
            parts[peers.rank].clone(), residual, weight, 1e-6, False
        )

    for total, (_, with_residual) in ranks.run(call):
        assert torch.equal(total, all_reduce_reference(parts))
        assert torch.equal(with_residual, want)


def test_a_chain_of_calls_of_all_kinds(library):
    """Each rank runs ahead as far as it may; what one call gives is what the next one takes."""
    size, shape = 3, (6, 200)
    ranks = Emulated(library, size)
    first = make_parts(size, shape, torch.bfloat16, 7) / 100
    residual, weight = first[0].clone(), make_parts(1, (200,), torch.bfloat16, 8)[0]

    kept = []  # what is enqueued runs later; a GPU's allocator knows that by itself

    def call(peers: Peers) -> torch.Tensor:
        x, total = first[peers.rank].clone(), residual.clone()
        kept.append((x, total))
        for step in range(5):
            path = list(SumPath)[step % 2]
            x, total = peers.all_reduce_norm(x, total, weight, 1e-6, False, path)
            x = peers.all_reduce(x, list(SumPath)[(step + 1) % 2])
            kept.append((x, total))
        return x

    x, total = first, residual
    for _ in range(5):
        normed, total = all_reduce_norm_reference(x, total, weight, 1e-6, False)
        x = normed.expand(size, *shape)
        x = all_reduce_reference(x).expand(size, *shape)
    results = ranks.run(call)
    for found in results:
        assert torch.equal(found, results[0])
    torch.testing.assert_close(results[0].float(), x[0].float(), rtol=0.05, atol=0.05)


def test_a_missing_rank_is_named(library):
    ranks = Emulated(library, 3, timeout=0.2)
    kept = [peers.all_reduce(torch.ones(4, 8), SumPath.TWO_SHOT) for peers in ranks.peers[:2]]
    library.run()
    assert len(kept) == 2
    for peers in ranks.peers[:2]:
        with pytest.raises(RuntimeError, match="waited for rank 2 in vain"):
            peers.check()


def test_the_host_ends_a_wait(library):
    ranks = Emulated(library, 2, timeout=600.0)
    kept = ranks.peers[0].all_reduce(torch.ones(4, 8), SumPath.ONE_SHOT)
    ranks.peers[0].abort()
    library.run()
    assert kept is not None
    with pytest.raises(RuntimeError, match="stopped"):
        ranks.peers[0].check()


def test_a_missing_barrier_is_seen(tmp_path):
    """One that was left out, between rows of a norm: a fast warp spoils what a slow one reads."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    file = tmp_path / "csrc/cuda/all_reduce_thread.h"
    barrier = "lane::sync();  // before the next row's parts"
    assert barrier in file.read_text()
    file.write_text(file.read_text().replace(barrier, ""))
    ranks = Emulated(build(tmp_path, tmp_path / "csrc"), 3)
    parts = make_parts(3, (9, 4104), torch.bfloat16, 9) * 10.0 ** torch.arange(9).view(9, 1)
    parts = parts.bfloat16()  # each row is far larger than the one before: its parts would show
    residual, weight = parts[0].clone(), torch.ones(4104, dtype=torch.bfloat16)
    want = all_reduce_norm_reference(parts, residual, weight, 1e-6, False)[0].float()
    results = ranks.run(
        lambda peers: peers.all_reduce_norm(
            parts[peers.rank].clone(), residual, weight, 1e-6, False, SumPath.ONE_SHOT
        )
    )
    assert not all(
        torch.allclose(normed.float(), want, rtol=0.05, atol=0.05) for normed, _ in results
    )
