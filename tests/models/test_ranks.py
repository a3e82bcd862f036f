"""Tensor parallelism: two ranks, here two threads, compute what one does."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from minisgl.models.config import ModelConfig
from minisgl.models.loader import load_model
from minisgl.parallel import Solo
from tests.models.checkpoints import make
from tests.models.driver import Paged


@dataclass(frozen=True)
class Thread:
    """One of `size` ranks that meet in shared memory."""

    rank: int
    size: int
    desk: list[torch.Tensor | None]
    barrier: threading.Barrier

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.desk[self.rank] = x.clone()
        self.barrier.wait(60)
        everyone = [other for other in self.desk if other is not None]
        self.barrier.wait(60)
        return everyone

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._exchange(x)).sum(0)

    def all_gather(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        return torch.cat(self._exchange(x), dim=dim)

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        return self._exchange(x)[source]


@pytest.mark.parametrize("name", ["llama3-biased-tied", "qwen3-moe", "gemma3"])
def test_two_ranks_equal_one(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)  # an odd vocabulary: the last rank holds a padding row
    config = ModelConfig.from_hf(tmp_path)
    desk: list[torch.Tensor | None] = [None, None]
    barrier = threading.Barrier(2)
    comms = [Thread(rank, 2, desk, barrier) for rank in range(2)]
    prompt = {0: torch.randint(3, 211, (30,), generator=torch.manual_seed(3)).tolist()}

    def logits(comm: Solo | Thread) -> torch.Tensor:
        decoder = load_model(
            config, tmp_path, dtype=torch.float32, device=torch.device("cpu"), comm=comm
        )
        return Paged(decoder, 1, 30).prefill(prompt, chunk=11)[0]

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(logits, comms))
    assert torch.equal(*both)
    torch.testing.assert_close(both[0], logits(Solo()), atol=1e-4, rtol=0)
