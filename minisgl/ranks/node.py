"""A node other than 0: runs its ranks until node 0 stops them, and serves no requests."""

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

PER_NODE = ("node_rank", "model", "cpu_level", "log_level")  # fields that may differ between nodes

log = get_logger(__name__)


def run_node(config: EngineConfig, path: Path) -> None:
    """Run the ranks of node `config.node_rank`, which is not 0, until node 0 stops them.

    path: the model's directory here. ValueError when node 0 has another config, RuntimeError when
    it cannot be reached or a rank fails.
    """
    count = config.tp_size // config.nnodes
    first = config.node_rank * count
    ranks = f"rank {first}" if count == 1 else f"ranks {first} to {first + count - 1}"
    this = f"node {config.node_rank} of {config.nnodes} with {ranks}"
    log.info("%s waits for node 0 at %s", this, config.dist_init_addr)
    store = open_store(config)
    _compare(config, store)
    ended = threading.Semaphore(0)
    children: dict[int, Child] = {}
    try:
        for rank in range(first, first + count):
            children[rank] = start_rank(Boot(config, str(path), rank))
            children[rank].on_exit(ended.release)
        log.info("%s is running; it ends when node 0 does", this)
        for _ in children:
            ended.acquire()
            for rank, child in children.items():
                if child.exit_code:
                    raise RuntimeError(child.exit_reason(f"rank {rank}"))
    except RuntimeError as error:
        with contextlib.suppress(dist.DistError):  # node 0 has ended already
            store.set("failed", f"node {config.node_rank}: {error}")
        raise
    finally:
        for child in children.values():
            child.close()
    log.info("%s was told to stop", this)


def _compare(config: EngineConfig, store: dist.Store) -> None:
    try:
        theirs = msgspec.msgpack.decode(store.get("config"), type=EngineConfig)
    except dist.DistError as error:
        raise RuntimeError(
            f"node 0 at {config.dist_init_addr} did not send its config: {error}"
        ) from error
    for name in EngineConfig.__dataclass_fields__:
        here, there = getattr(config, name), getattr(theirs, name)
        if here != there and name not in PER_NODE:
            raise ValueError(f"{name} must be {there!r} as on node 0, got {here!r}")
