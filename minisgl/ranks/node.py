"""A machine that serves nothing itself: it runs its ranks for node 0, until that one stops them."""

import contextlib
import threading
from pathlib import Path

import msgspec
import torch.distributed as dist

from minisgl.child import Child
from minisgl.config import EngineConfig
from minisgl.log import get_logger
from minisgl.ranks.channel import Boot
from minisgl.ranks.leader import start_rank
from minisgl.ranks.meeting import open_store

NODE_OWN = ("node_rank", "model", "log_level")  # what nodes may be told differently

log = get_logger(__name__)


def run_node(config: EngineConfig, path: Path) -> None:
    """Run the ranks of node `config.node_rank`, which is not 0, until node 0 stops them.

    path: the model's directory here. ValueError when node 0 was configured otherwise, RuntimeError
    when it cannot be reached or a rank ends by itself.
    """
    count = config.tp_size // config.nnodes
    first = config.node_rank * count
    ranks = f"rank {first}" if count == 1 else f"ranks {first} to {first + count - 1}"
    who = f"node {config.node_rank} of {config.nnodes} with {ranks}"
    log.info("%s waits for node 0 at %s", who, config.dist_init_addr)
    store = open_store(config)
    _compare(config, store)
    ended = threading.Semaphore(0)
    children: dict[int, Child] = {}
    try:
        for rank in range(first, first + count):
            children[rank] = start_rank(Boot(config, str(path), rank))
            children[rank].on_exit(ended.release)
        log.info("%s runs; it ends when node 0 does", who)
        for _ in children:
            ended.acquire()
            for rank, child in children.items():
                if child.exit_code:
                    raise RuntimeError(child.exit_reason(f"rank {rank}"))
    except RuntimeError as error:
        with contextlib.suppress(dist.DistError):  # node 0 may be gone, or need not be told
            store.set("failed", f"node {config.node_rank}: {error}")
        raise
    finally:
        for child in children.values():
            child.close()
    log.info("%s was told to stop", who)


def _compare(config: EngineConfig, store: dist.Store) -> None:
    try:
        theirs = msgspec.msgpack.decode(store.get("config"), type=EngineConfig)
    except dist.DistError as error:
        raise RuntimeError(f"node 0 at {config.dist_init_addr} says nothing: {error}") from error
    for name in EngineConfig.__dataclass_fields__:
        here, there = getattr(config, name), getattr(theirs, name)
        if here != there and name not in NODE_OWN:
            raise ValueError(f"{name} must be {there!r} as on node 0, got {here!r}")
