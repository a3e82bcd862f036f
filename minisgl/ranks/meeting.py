"""How ranks find each other: torch's rendezvous store and rank 0's listener.

On one machine the other ranks inherit all they need. Between machines the store at node 0's address
(`--dist-init-addr`) tells the ranks the address of rank 0's listener, from which they get batches,
and the key that it asks for.
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
from minisgl.ranks.channel import MESSAGE_BYTES, Channel

RENDEZVOUS_SECONDS = 600  # how long nodes wait for each other to start
CONNECT_SECONDS = 30  # to connect to a port that is listened on
KEY_BYTES = 16
HELLO_BYTES = 64  # at most, as msgpack
LOOPBACK = "127.0.0.1"


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """The first message over TCP: which rank connects, and the key from the store."""

    rank: int
    key: bytes


def open_store(
    config: EngineConfig, *, serve: bool = False, port: int | None = None
) -> dist.TCPStore:
    """The store at `dist_init_addr`; on one machine, on a free port or the given one.

    ConnectionError when it cannot be served, or is not reached in time.
    """
    host, number = split_address(config.dist_init_addr or f"{LOOPBACK}:{port or 0}")
    if not serve:
        _wait_until_reachable(host, number)
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
        raise ConnectionError(f"dist_init_addr {host}:{number} {what}: {error}") from error
    store.set_timeout(timedelta(seconds=RENDEZVOUS_SECONDS))
    return store


def _wait_until_reachable(host: str, port: int) -> None:
    """Wait until the port is listened on. The store would wait too, but uninterruptibly."""
    deadline = time.monotonic() + RENDEZVOUS_SECONDS
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConnectionError(
                    f"dist_init_addr {host}:{port} was not reached within {RENDEZVOUS_SECONDS} s: "
                    f"{error}"
                ) from error
        time.sleep(0.2)


class Listener:
    """Accepts the ranks of other nodes on rank 0. A connection without the key is closed."""

    def __init__(self, host: str) -> None:
        family, _, _, _, (address, *_) = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        self._socket = socket.create_server((str(address), 0), family=family)
        self._socket.setblocking(False)
        self._unidentified: set[Channel] = set()  # have not sent their Hello yet
        self._selector = DefaultSelector()
        self._selector.register(self._socket, EVENT_READ)
        self.key = secrets.token_bytes(KEY_BYTES)

    @property
    def address(self) -> str:
        """ "host:port" """
        host, port = self._socket.getsockname()[:2]
        return f"{host}:{port}"

    def accept(self, timeout: float) -> tuple[int, Channel] | None:
        """A rank that has connected, and its channel; None if `timeout` seconds pass first, or a
        connection has not identified itself yet."""
        for key, _ in self._selector.select(timeout):
            if not isinstance(key.fileobj, Channel):
                self._accept_connection()
            elif (rank := self._identify(key.fileobj)) is not None:
                return rank, key.fileobj
        return None

    def _accept_connection(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it has hung up already
            connected, _ = self._socket.accept()
            channel = Channel(connected)
            channel.longest = HELLO_BYTES
            self._unidentified.add(channel)
            self._selector.register(channel, EVENT_READ)

    def _identify(self, channel: Channel) -> int | None:
        """Its rank; None while its Hello is incomplete, or when it is closed for a wrong key."""
        try:
            if (message := channel.receive(timeout=0)) is None:
                return None
            hello = msgspec.msgpack.decode(message, type=Hello)
        except (OSError, EOFError, msgspec.MsgspecError):
            hello = Hello(0, b"")
        self._selector.unregister(channel)
        self._unidentified.remove(channel)
        if secrets.compare_digest(hello.key, self.key):
            channel.longest = MESSAGE_BYTES
            return hello.rank
        channel.close()
        return None

    def close(self) -> None:
        self._selector.close()
        self._socket.close()
        for channel in self._unidentified:
            channel.close()


def connect_to_listener(address: str, rank: int, key: bytes) -> Channel:
    """Connect to rank 0's `Listener`."""
    channel = Channel(socket.create_connection(split_address(address), timeout=CONNECT_SECONDS))
    channel.send(msgspec.msgpack.encode(Hello(rank, key)))
    return channel


def host_of(config: EngineConfig) -> str:
    """The address by which other ranks reach the machine of rank 0."""
    return LOOPBACK if config.dist_init_addr is None else split_address(config.dist_init_addr)[0]


def split_address(address: str) -> tuple[str, int]:
    """ "host:port", the host in brackets if it is an IPv6 address."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
