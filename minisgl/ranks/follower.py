"""A rank other than 0: its process, which loads its part of the model and replays rank 0's batches.

It plans nothing: the batches are rank 0's, and sampled tokens are broadcast on the device.
"""

import contextlib
import os
import socket
import sys
import threading
from pathlib import Path

import msgspec
import torch.distributed as dist

from minisgl import csrc
from minisgl.child import read_boot
from minisgl.core.executor import Failed, Profiled
from minisgl.device import pick_device
from minisgl.log import configure, get_logger
from minisgl.parallel import Communicator
from minisgl.parallel.connect import connect
from minisgl.ranks.channel import (
    Boot,
    Channel,
    Dispatch,
    FromRank,
    Loaded,
    Sample,
    StartRankProfile,
    Stop,
    StopRankProfile,
    ToRank,
)
from minisgl.ranks.meeting import connect_to_listener, host_of, open_store
from minisgl.start.facts import read_facts
from minisgl.start.load import load_worker
from minisgl.step.executor import LocalExecutor, plan_on_one_thread

IDLE_SECONDS = 1.0  # without a message; then the last step is collected too

log = get_logger(__name__)


def follow(boot: Boot, channel: Channel, store: dist.Store | None) -> None:
    """Load the model, then run rank 0's batches until it sends Stop. Raises any error of both."""
    config = boot.config
    local_size = config.tp_size // config.nnodes
    csrc.use_level(config.cpu_level)
    device = pick_device(config.device, index=boot.rank % local_size, of=local_size)
    if device.torch_device.type == "cpu":
        plan_on_one_thread()
    host = channel.host if boot.channel is None else host_of(config)
    comm = connect(config, device, boot.rank, store=store, shared=boot.shared, host=host)
    facts = read_facts(config, Path(boot.path), device, boot.rank)
    worker = load_worker(facts, device, comm)
    details = config.profile_dir is not None
    executor = LocalExecutor(worker, rank=boot.rank, trace_details=details)
    _send(channel, Loaded())
    _replay(executor, comm, channel)
    executor.close()
    comm.close()


def _replay(executor: LocalExecutor, comm: Communicator, channel: Channel) -> None:
    """Run what rank 0 sends until Stop. One step stays in flight, as on rank 0: the next is packed
    while it runs."""
    decode = msgspec.msgpack.Decoder(ToRank).decode
    in_flight = 0
    while True:
        data = channel.receive(IDLE_SECONDS)
        message = None if data is None else decode(data)
        match message:
            case Dispatch(batch):
                executor.dispatch(batch)
            case Sample(step):
                executor.sample(step)
                in_flight += 1
            case Stop():
                return
        while in_flight > isinstance(message, Dispatch | Sample):
            executor.collect()
            comm.check()
            in_flight -= 1
        match message:
            case StartRankProfile(traces):
                executor.start_profile(traces=traces)
            case StopRankProfile(directory):
                try:
                    _send(channel, Profiled(executor.stop_profile(directory)))
                except OSError as error:
                    _send(channel, Profiled([], str(error)))


def _send(channel: Channel, message: FromRank) -> None:
    channel.send(msgspec.msgpack.encode(message))


def _open_channel(boot: Boot, store: dist.Store | None) -> Channel:
    if boot.channel is not None:
        return Channel(socket.socket(fileno=boot.channel))
    assert store is not None
    address = store.get("channel").decode()
    return connect_to_listener(address, boot.rank, store.get("key"))


def _exit_with_rank_0(channel: Channel) -> None:
    """Exit when rank 0 has ended: nothing this rank waits for would come. In its own thread."""
    channel.wait_for_end()
    log.error("rank 0 has ended, or has ended all ranks; its log says why")
    sys.stderr.flush()
    os._exit(1)


def main() -> int:
    boot = msgspec.msgpack.decode(read_boot(), type=Boot)
    level = "debug" if boot.config.log_level == "debug" else "error"  # rank 0 logs the rest for all
    configure(level, f"rank {boot.rank}")
    store = None if boot.shared is not None else open_store(boot.config, port=boot.port)
    channel = _open_channel(boot, store)
    exiting = threading.Thread(target=_exit_with_rank_0, args=(channel,), daemon=True)
    exiting.start()
    try:
        follow(boot, channel, store)
    except (EOFError, ConnectionResetError):
        exiting.join()
    except Exception as error:
        log.exception("rank %d failed", boot.rank)
        with contextlib.suppress(OSError):
            _send(channel, Failed(f"{type(error).__name__}: {error}"))
    else:
        return 0
    return 1


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # at once: a stream may hang in a collective that will never end
