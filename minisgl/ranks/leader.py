"""Rank 0's view of the other ranks: starts them, sends to them, notices when one ends."""

import atexit
import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import NoReturn

import msgspec
import torch.distributed as dist

from minisgl.child import Child
from minisgl.config import EngineConfig
from minisgl.core.executor import Failed, Profiled
from minisgl.device import Device
from minisgl.log import get_logger
from minisgl.parallel import Communicator, shared_memory
from minisgl.parallel.connect import connect
from minisgl.ranks.channel import Boot, Channel, FromRank, Loaded, Stop, ToRank
from minisgl.ranks.meeting import RENDEZVOUS_SECONDS, Listener, host_of, open_store

EXIT_GRACE_SECONDS = 5.0  # that a rank has to exit when told to, before it is killed
EXIT_WAIT_SECONDS = 2.0  # for the exit of a rank to be noticed, once work with it has failed
# A rank's error is held back this long: the exit of another rank may be its cause, and is reported.
CAUSE_WAIT_SECONDS = 1.0

log = get_logger(__name__)


class Ranks:
    """All ranks but 0: started, watched, told what to do. If one fails, all of them end.

    `failure` then says why. Methods are called by the thread that plans.
    """

    def __init__(self, size: int) -> None:
        self.failure: str | None = None
        self._comm: Communicator | None = None
        self._size = size
        self._closing = False
        self._children: dict[int, Child] = {}
        self._channels: dict[int, Channel] = {}
        self._listeners: list[threading.Thread] = []
        self._answers: dict[int, Loaded | Profiled] = {}  # to what all were asked last
        self._changed = threading.Condition()
        self._encode = msgspec.msgpack.Encoder().encode
        self._shared: int | None = None
        atexit.register(self.end)  # before rank 0's device is closed, whose stream may wait for one

    def start(self, config: EngineConfig, path: Path, device: Device) -> Communicator:
        """Start the processes of this machine and wait for those of other nodes; they load while
        the caller does. RuntimeError when one ends or does not come."""
        on_cpu = device.torch_device.type == "cpu"
        if on_cpu and config.nnodes == 1 and shared_memory.available():
            self._shared = shared_memory.create(self._size)
        store = None if self._shared is not None else open_store(config, serve=True)
        self._start_children(config, path, store)
        if config.nnodes > 1:
            assert store is not None
            self._accept_nodes(config, store)
        shared, host = self._shared, host_of(config)
        return self._connect(
            lambda: connect(config, device, 0, store=store, shared=shared, host=host)
        )

    @property
    def comm(self) -> Communicator:
        assert self._comm is not None
        return self._comm

    def wait_ready(self) -> None:
        """Wait until every rank has loaded. RuntimeError when one fails instead."""
        self._wait_for_answers()

    def wait_profiled(self) -> list[str]:
        """The trace files of every rank, which were told to stop their profiles. OSError when one
        could not be written."""
        answers = [a for a in self._wait_for_answers() if isinstance(a, Profiled)]
        for answer in answers:
            if answer.refusal is not None:
                raise OSError(answer.refusal)
        return [file for answer in answers for file in answer.paths]

    def send(self, message: ToRank) -> None:
        """To every rank. RuntimeError when one has failed."""
        self.check()
        data = self._encode(message)
        try:
            for channel in self._channels.values():
                channel.send(data)
        except OSError as error:
            self.explain(error)

    def check(self) -> None:
        """Raises RuntimeError when a rank has failed."""
        if self.failure is not None:
            raise RuntimeError(self.failure)

    def explain(self, error: BaseException) -> NoReturn:
        """Raise an error of rank 0, or the failure of another rank if that is its cause.

        Waits shortly: an operation may fail before the listener has noticed that a rank ended.
        """
        if isinstance(error, RuntimeError | OSError):
            with self._changed:
                self._changed.wait_for(lambda: self.failure is not None, EXIT_WAIT_SECONDS)
            if self.failure is not None:
                raise RuntimeError(self.failure) from error
        raise error

    def end(self) -> None:
        """Kill all ranks at once; the communicator fails from then on. Idempotent."""
        self._closing = True
        self._end_all()

    def close(self) -> None:
        """Let all ranks finish what they were sent, end them and free everything.

        Idempotent. Nothing may use the communicator any longer.
        """
        if not self._closing and self.failure is None:
            self._closing = True
            stop = self._encode(Stop())
            for channel in self._channels.values():
                with contextlib.suppress(OSError):  # it has ended already
                    channel.send(stop)
        self._closing = True
        comm, self._comm = self._comm, None
        if comm is not None:
            comm.close()  # at the same time as the others: they may hold memory of each other
        deadline = time.monotonic() + EXIT_GRACE_SECONDS
        for child in self._children.values():
            child.wait(max(0.0, deadline - time.monotonic()))
            child.close()
        for thread in self._listeners:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._end_all()
        for thread in self._listeners:
            thread.join()
        for channel in self._channels.values():
            channel.close()
        if self._shared is not None:
            os.close(self._shared)
            self._shared = None
        atexit.unregister(self.end)

    def _start_children(self, config: EngineConfig, path: Path, store: dist.Store | None) -> None:
        port = store.port if isinstance(store, dist.TCPStore) else None
        for rank in range(1, self._size // config.nnodes):
            ours, theirs = socket.socketpair()
            with theirs:
                boot = Boot(config, str(path), rank, theirs.fileno(), self._shared, port)
                self._children[rank] = start_rank(boot)
            self._listen_to(rank, Channel(ours))

    def _accept_nodes(self, config: EngineConfig, store: dist.Store) -> None:
        """Wait for the ranks of the other nodes to connect."""
        missing = set(range(self._size)) - {0} - set(self._channels)
        listener = Listener(host_of(config))
        try:
            store.set("config", self._encode(config))
            store.set("key", listener.key)
            store.set("channel", listener.address)
            deadline = time.monotonic() + RENDEZVOUS_SECONDS
            log.info(
                "waiting for %d ranks of other nodes at %s", len(missing), config.dist_init_addr
            )
            while missing:
                came = listener.accept(timeout=0.5)
                self.check()
                if store.check(["failed"]):  # on a node, before its ranks connected
                    raise RuntimeError(store.get("failed").decode())
                if came is not None:
                    rank, channel = came
                    if rank not in missing:
                        channel.close()
                        raise RuntimeError(
                            f"rank {rank} connected, missing are {sorted(missing)}: is each node "
                            "started with its own node_rank?"
                        )
                    missing.remove(rank)
                    self._listen_to(rank, channel)
                elif time.monotonic() > deadline:
                    raise RuntimeError(
                        f"ranks {sorted(missing)} did not connect to {config.dist_init_addr} in "
                        f"{RENDEZVOUS_SECONDS} s: is each node started, with its own node_rank?"
                    )
        finally:
            listener.close()

    def _connect(self, connect: Callable[[], Communicator]) -> Communicator:
        """The result of `connect`, which runs in a thread: it cannot be interrupted while it waits
        for a rank that has ended, so when a rank fails this raises without waiting for it."""
        connecting: Future[Communicator] = Future()

        def run() -> None:
            try:
                connecting.set_result(connect())
            except BaseException as error:  # of any library; raised by `result` below
                connecting.set_exception(error)
            with self._changed:
                self._changed.notify_all()

        thread = threading.Thread(target=run, name="connect", daemon=True)
        thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or connecting.done())
            if self.failure is None:
                self._comm = connecting.result()
        if self.failure is not None:
            # It ends soon or in minutes; native code must not return into a Python that is exiting.
            thread.join(EXIT_WAIT_SECONDS)
        self.check()
        return self.comm

    def _wait_for_answers(self) -> list[Loaded | Profiled]:
        """The next answer of every rank, in order of ranks."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.failure is not None or len(self._answers) == self._size - 1
            )
            answers, self._answers = self._answers, {}
        self.check()
        return [answers[rank] for rank in sorted(answers)]

    def _listen_to(self, rank: int, channel: Channel) -> None:
        self._channels[rank] = channel
        thread = threading.Thread(target=self._receive, args=(rank, channel), daemon=True)
        self._listeners.append(thread)
        thread.start()

    def _receive(self, rank: int, channel: Channel) -> None:
        """Receive a rank's messages until its connection ends. In a thread of its own."""
        decode = msgspec.msgpack.Decoder(FromRank).decode
        with contextlib.suppress(OSError, EOFError):
            while True:
                message = decode(channel.receive() or b"")
                if isinstance(message, Failed):
                    with self._changed:
                        self._changed.wait_for(lambda: self.failure is not None, CAUSE_WAIT_SECONDS)
                    self._fail(f"rank {rank} failed: {message.reason}")
                    continue
                with self._changed:
                    self._answers[rank] = message
                    self._changed.notify_all()
        if not self._closing:
            self._fail(self._exit_reason(rank))

    def _exit_reason(self, rank: int) -> str:
        child = self._children.get(rank)
        if child is None:
            return f"rank {rank}, on another node, has ended; its log says why"
        if child.wait(EXIT_WAIT_SECONDS):
            return child.exit_reason(f"rank {rank}")
        return f"rank {rank} closed its connection"

    def _fail(self, reason: str) -> None:
        with self._changed:
            if self.failure is not None or self._closing:
                return
            self.failure = reason
            self._changed.notify_all()
        log.error("%s; all other ranks are ended too", reason)
        self._end_all()

    def _end_all(self) -> None:
        """End all waits, then kill every rank."""
        if (comm := self._comm) is not None:
            comm.abort()
        for child in list(self._children.values()):  # more may just be starting
            child.kill()
        for channel in list(self._channels.values()):
            channel.shut()


def start_rank(boot: Boot) -> Child:
    """Start the process of one rank."""
    fds = [fd for fd in (boot.channel, boot.shared) if fd is not None]
    return Child("minisgl.ranks.follower", msgspec.msgpack.encode(boot), fds)
