"""Where ranks meet: torch's rendezvous store, rank 0's door for other nodes, and `meet` itself.

On one machine the other ranks inherit all they need. Between machines the store at node 0's address
(`--dist-init-addr`) tells the ranks where rank 0 sends its batches from, and what it expects to be
told by those it lets in.
"""

import contextlib
import secrets
import socket
import time
from datetime import timedelta
from selectors import EVENT_READ, DefaultSelector

import msgspec
import torch.distributed as dist

from minisgl.config import EngineConfig
from minisgl.device import Device
from minisgl.parallel import Communicator
from minisgl.parallel.connect import connect
from minisgl.ranks.channel import MESSAGE_BYTES, Channel

RENDEZVOUS_SECONDS = 600  # how long nodes wait for each other to start
CONNECT_SECONDS = 30  # to a port that somebody listens at
KEY_BYTES = 16
HELLO_BYTES = 64  # at most, as msgpack
LOOPBACK = "127.0.0.1"


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """The first message over TCP: who comes, and that it was told the key."""

    rank: int
    key: bytes


def open_store(
    config: EngineConfig, *, serve: bool = False, port: int | None = None
) -> dist.TCPStore:
    """The store at `dist_init_addr`; on one machine, on a free port or the given one.

    RuntimeError when it cannot be served, or is not there in time.
    """
    host, number = LOOPBACK, port or 0
    if config.dist_init_addr is not None:
        host, number = split_address(config.dist_init_addr)
    if not serve:
        _wait_for_door(host, number)
    try:
        store = dist.TCPStore(
            host,
            number,
            is_master=serve,
            wait_for_workers=False,
            timeout=timedelta(seconds=CONNECT_SECONDS),
        )
    except dist.DistError as error:
        what = "cannot be listened on" if serve else "cannot be reached"
        raise RuntimeError(f"dist_init_addr {host}:{number} {what}: {error}") from error
    store.set_timeout(timedelta(seconds=RENDEZVOUS_SECONDS))
    return store


def _wait_for_door(host: str, port: int) -> None:
    """Until somebody listens there; here, and not in the store, because this can be interrupted."""
    deadline = time.monotonic() + RENDEZVOUS_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"dist_init_addr {host}:{port} was not reached within {RENDEZVOUS_SECONDS} s: "
                    f"{error}"
                ) from error
        time.sleep(0.2)


def meet(
    config: EngineConfig,
    device: Device,
    rank: int,
    *,
    store: dist.Store | None,
    shared: int | None,
    host: str | None = None,
) -> Communicator:
    """The communicator of a rank, once all have come. host: its address for other nodes.

    On any thread, not in the device's stream: who waits for a rank that is gone, waits long.
    """
    if host is None:
        host = LOOPBACK
        if config.dist_init_addr is not None:
            host = split_address(config.dist_init_addr)[0]
    return connect(
        device.torch_device,
        rank,
        config.tp_size,
        local_size=config.tp_size // config.nnodes,
        store=None if store is None else dist.PrefixStore("ranks", store),
        shared=shared,
        ordered=config.batch_invariant,
        host=host,
    )


class Listener:
    """Rank 0's door for the ranks of other nodes. Who does not know the key is turned away."""

    def __init__(self, host: str) -> None:
        family, _, _, _, (address, *_) = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        self._socket = socket.create_server((str(address), 0), family=family)
        self._socket.setblocking(False)
        self._guests: set[Channel] = set()  # who has not said yet what it is
        self._selector = DefaultSelector()
        self._selector.register(self._socket, EVENT_READ)
        self.key = secrets.token_bytes(KEY_BYTES)

    @property
    def address(self) -> str:
        """ "host:port" """
        host, port = self._socket.getsockname()[:2]
        return f"{host}:{port}"

    def accept(self, timeout: float) -> tuple[int, Channel] | None:
        """A rank that has come, and its channel; None if nothing has happened within `timeout`
        seconds, or nothing that made a rank of a guest."""
        for key, _ in self._selector.select(timeout):
            if not isinstance(key.fileobj, Channel):
                self._let_in()
            elif (rank := self._hear(key.fileobj)) is not None:
                return rank, key.fileobj
        return None

    def _let_in(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it has left already
            connected, _ = self._socket.accept()
            guest = Channel(connected)
            guest.longest = HELLO_BYTES
            self._guests.add(guest)
            self._selector.register(guest, EVENT_READ)

    def _hear(self, guest: Channel) -> int | None:
        """Its rank. None for who has not spoken yet, or is sent away for not knowing the key."""
        try:
            if (message := guest.receive(timeout=0)) is None:
                return None
            hello = msgspec.msgpack.decode(message, type=Hello)
        except (OSError, EOFError, msgspec.MsgspecError):
            hello = Hello(0, b"")
        self._selector.unregister(guest)
        self._guests.remove(guest)
        if secrets.compare_digest(hello.key, self.key):
            guest.longest = MESSAGE_BYTES
            return hello.rank
        guest.close()
        return None

    def close(self) -> None:
        self._selector.close()
        self._socket.close()
        for guest in self._guests:
            guest.close()


def call(address: str, rank: int, key: bytes) -> Channel:
    """Connect to rank 0's `Listener`."""
    channel = Channel(socket.create_connection(split_address(address), timeout=CONNECT_SECONDS))
    channel.send(msgspec.msgpack.encode(Hello(rank, key)))
    return channel


def split_address(address: str) -> tuple[str, int]:
    """ "host:port", the host in brackets if it is an IPv6 address."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
