"""Where ranks meet: torch's rendezvous store, rank 0's door for other nodes, and `meet` itself.

On one machine the other ranks inherit all they need. Between machines the store at node 0's address
(`--dist-init-addr`) tells the ranks where rank 0 sends its batches from, and what it expects to be
told by those it lets in.
"""

import secrets
import socket
import time
from datetime import timedelta

import msgspec
import torch.distributed as dist

from minisgl.config import EngineConfig
from minisgl.device import Device
from minisgl.parallel import Communicator
from minisgl.parallel.connect import connect
from minisgl.runtime.channel import Channel

RENDEZVOUS_SECONDS = 600  # how long nodes wait for each other to start
LOOPBACK = "127.0.0.1"


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """The first message over TCP: who comes, and that it was told the key."""

    rank: int
    key: str


def open_store(
    config: EngineConfig, *, serve: bool = False, port: int | None = None
) -> dist.TCPStore:
    """The store at `dist_init_addr`; on one machine, on a free port or the given one.

    RuntimeError when it cannot be served, or is not there in time.
    """
    host, number = LOOPBACK, port or 0
    if config.dist_init_addr is not None:
        host, number = split_address(config.dist_init_addr)
    patience = timedelta(seconds=RENDEZVOUS_SECONDS)
    if not serve:
        _wait_for_door(host, number)
    try:
        return dist.TCPStore(
            host, number, is_master=serve, wait_for_workers=False, timeout=patience
        )
    except dist.DistError as error:
        what = "cannot be listened on" if serve else "cannot be reached"
        raise RuntimeError(f"dist_init_addr {host}:{number} {what}: {error}") from error


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
    """The communicator of a rank, once all have come. host: its address for other nodes."""
    if host is None:
        host = LOOPBACK
        if config.dist_init_addr is not None:
            host = split_address(config.dist_init_addr)[0]

    def connected() -> Communicator:
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

    return device.run(connected)


class Listener:
    """Rank 0's door for the ranks of other nodes. Who does not know the key is turned away."""

    def __init__(self, host: str) -> None:
        family, _, _, _, (address, *_) = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        self._socket = socket.create_server((str(address), 0), family=family)
        self.key = secrets.token_hex(16)

    @property
    def address(self) -> str:
        """ "host:port" """
        host, port = self._socket.getsockname()[:2]
        return f"{host}:{port}"

    def accept(self, timeout: float) -> tuple[int, Channel] | None:
        """The next rank and its channel; None if none has come within `timeout` seconds."""
        self._socket.settimeout(timeout)
        try:
            connected, _ = self._socket.accept()
        except TimeoutError:
            return None
        connected.settimeout(None)
        channel = Channel(connected)
        try:
            message = channel.receive(timeout=10)
            hello = msgspec.msgpack.decode(message or b"", type=Hello)
        except (OSError, EOFError, msgspec.MsgspecError):
            channel.close()
            return None
        if not secrets.compare_digest(hello.key, self.key):
            channel.close()
            return None
        return hello.rank, channel

    def close(self) -> None:
        self._socket.close()


def call(address: str, rank: int, key: str) -> Channel:
    """Connect to rank 0's `Listener`."""
    host, port = split_address(address)
    channel = Channel(socket.create_connection((host, port), timeout=RENDEZVOUS_SECONDS))
    channel.send(msgspec.msgpack.encode(Hello(rank, key)))
    return channel


def split_address(address: str) -> tuple[str, int]:
    """ "host:port", the host in brackets if it is an IPv6 address."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)
