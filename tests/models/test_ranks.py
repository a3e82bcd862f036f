"""Tensor parallelism: ranks, here threads, compute what one does, with two sums a layer."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from minisgl.layers.weights import Placement
from minisgl.models.config import ModelConfig
from minisgl.models.loader import load_model
from minisgl.parallel import Communicator, share
from tests.models.driver import Paged
from tests.world.checkpoints import CHECKPOINTS, make


@dataclass(eq=False)
class Thread(Communicator):
    """One of `size` ranks that meet in shared memory; it counts what is asked of it."""

    desk: list[torch.Tensor | None] = field(default_factory=list)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    calls: Counter[str] = field(default_factory=Counter)

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self.desk[self.rank] = x.clone()
        self.barrier.wait(60)
        everyone = [other for other in self.desk if other is not None]
        self.barrier.wait(60)
        return everyone

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.calls["sums"] += 1
        return torch.stack(self._exchange(x)).sum(0)

    def gather(self, x: torch.Tensor, width: int | None = None) -> torch.Tensor:
        self.calls["gathers"] += 1
        everyone = self._exchange(x)
        return torch.cat(everyone, -1)[..., :width] if self.rank == 0 else x


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama3-biased-tied", 2),
        ("llama3-biased-tied", 6),  # three ranks to a key head
        ("mistral-window", 3),
        ("qwen2", 6),
        ("qwen3-yarn-biased", 2),
        ("qwen3-moe", 2),
        ("qwen3-moe-mixed", 2),
        ("gemma2", 6),
        ("gemma3", 2),
    ],
)
def test_ranks_equal_one(name: str, size: int, tmp_path: Path, monkeypatch) -> None:
    if name == "mistral-window":
        monkeypatch.setitem(CHECKPOINTS[name][1], "num_key_value_heads", 3)
    make(name, tmp_path)  # an odd vocabulary: the last rank holds padding rows
    config = ModelConfig.from_hf(tmp_path)
    desk: list[torch.Tensor | None] = [None] * size
    barrier = threading.Barrier(size)
    comms = [Thread(rank, size, True, desk, barrier) for rank in range(size)]
    prompt = {0: torch.randint(3, 211, (30,), generator=torch.manual_seed(3)).tolist()}

    def logits(comm: Communicator) -> torch.Tensor:
        at = Placement(torch.float32, torch.device("cpu"), comm)
        decoder = load_model(config, tmp_path, at)
        return Paged(decoder, 1, 30).prefill(prompt, chunk=11)[0]

    with ThreadPoolExecutor(size) as pool:
        parts = list(pool.map(logits, comms))
    torch.testing.assert_close(parts[0], logits(Communicator()), atol=1e-4, rtol=0)
    steps = 3  # 30 tokens, 11 at a time
    for comm in comms:
        assert comm.calls["sums"] == steps * (2 * config.num_layers + 1)  # 1: the embedding
        assert comm.calls["gathers"] == steps


def test_what_cannot_be_shared_is_named() -> None:
    assert share("heads", 6, Communicator(1, 2)) == (3, 3)
    assert [share("key heads", 2, Communicator(r, 6), repeated=True) for r in range(6)] == [
        (0, 1), (0, 1), (0, 1), (1, 1), (1, 1), (1, 1),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"heads \(6\) cannot be shared equally by 4 ranks"):
        share("heads", 6, Communicator(0, 4))
    with pytest.raises(ValueError, match=r"key heads \(4\) cannot be shared equally by 6 ranks"):
        share("key heads", 4, Communicator(0, 6), repeated=True)
