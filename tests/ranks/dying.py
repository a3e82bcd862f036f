"""Ranks of which one kills itself while they connect.

    MORTAL=1:5 python -m tests.ranks.dying '{"tp_size": 2, ...}'

runs the node of that config; rank 1 dies after its fifth call to the store, with 0 before all,
and with -1 before it has connected to rank 0's listener.
Without arguments it is a rank's process, in place of `minisgl.ranks.follower`.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import torch.distributed as dist

from minisgl.build import build_engine, run_ranks
from minisgl.child import Child
from minisgl.config import EngineConfig
from minisgl.parallel import Communicator
from minisgl.parallel.connect import connect
from minisgl.ranks import follower, leader, node
from minisgl.ranks.channel import Boot

MORTAL, CALLS = map(int, os.environ["MORTAL"].split(":"))


class Mortal(dist.Store):
    """Another store, of whose calls one is the process's last."""

    def __init__(self, store: dist.Store) -> None:
        super().__init__()
        self._store = store
        self._left = CALLS

    def _call(self, name: str, *words: Any) -> Any:
        result = getattr(self._store, name)(*words)
        self._left -= 1
        if self._left == 0:
            die()
        return result

    def set(self, *words: Any) -> Any:
        return self._call("set", *words)

    def wait(self, *words: Any) -> Any:
        return self._call("wait", *words)

    def get(self, *words: Any) -> Any:
        return self._call("get", *words)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def connect_or_die(
    config: EngineConfig, device: Any, rank: int, *, store: dist.Store | None, **options: Any
) -> Communicator:
    if rank == MORTAL:
        if CALLS == 0:
            die()
        assert store is not None
        store = Mortal(store)
    return connect(config, device, rank, store=store, **options)


def start_rank(boot: Boot) -> Child:
    fds = [fd for fd in (boot.channel, boot.shared) if fd is not None]
    return Child("tests.ranks.dying", msgspec.msgpack.encode(boot), fds)


def main() -> int:
    leader.connect = follower.connect = connect_or_die
    if CALLS < 0:
        follower.connect_to_listener = lambda *words: die()
    leader.start_rank = node.start_rank = start_rank
    if len(sys.argv) == 1:
        return follower.main()
    config = EngineConfig(**json.loads(sys.argv[1]))
    run: Callable[[EngineConfig], object] = run_ranks if config.node_rank else build_engine
    if "WITHOUT_SHARED_MEMORY" in os.environ:
        leader.shared_memory.available = lambda: False
    try:
        run(config)
    except RuntimeError as error:
        print(f"ended: {error}")
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # at once, as ranks do: a thread may still wait in gloo for the one that died
