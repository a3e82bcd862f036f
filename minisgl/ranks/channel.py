"""The messages between rank 0 and the other ranks, as msgpack over stream sockets.

Rank 0 plans: it sends every batch, and when to sample it. The others answer when they are ready
and when they fail. A process that ends closes its connection, which the other side notices.
"""

import contextlib
import select
import socket
import struct

import msgspec

from minisgl.config import EngineConfig
from minisgl.core.batch import Batch
from minisgl.core.executor import Failed, Profiled

MESSAGE_BYTES = 2**32 - 1
# How soon a dead machine is noticed. On an idle connection: seconds until the first probe, seconds
# between probes, and how many may stay unanswered. While sent data waits for its acknowledgement
# there are no probes: then the milliseconds it may wait.
KEEPALIVE = {"TCP_KEEPIDLE": 4, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}
_LENGTH = struct.Struct("<I")


class Dispatch(msgspec.Struct, frozen=True, array_like=True, tag="dispatch"):
    batch: Batch


class Sample(msgspec.Struct, frozen=True, array_like=True, tag="sample"):
    step: int


class StartRankProfile(msgspec.Struct, frozen=True, array_like=True, tag="start_profile"):
    traces: bool


class StopRankProfile(msgspec.Struct, frozen=True, array_like=True, tag="stop_profile"):
    """Answered by a `Profiled` with the trace files that the rank wrote."""

    directory: str


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """Finish what was sent, then end."""


class Loaded(msgspec.Struct, frozen=True, array_like=True, tag="loaded"):
    """The rank has loaded and is warm."""


ToRank = Dispatch | Sample | StartRankProfile | StopRankProfile | Stop
FromRank = Loaded | Profiled | Failed


class Boot(msgspec.Struct, frozen=True):
    """What a rank's process is started with; descriptors are open in it."""

    config: EngineConfig
    path: str  # of the model
    rank: int
    channel: int | None = None  # a connected socket; None where rank 0 is on another node
    shared: int | None = None  # the memory that all ranks map, where they share a machine's CPUs
    port: int | None = None  # of rank 0's store on this machine, where no address was stated


class Channel:
    """Whole messages over a connected stream socket. OSError or EOFError once it is closed.

    One thread may send while another receives.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.longest = MESSAGE_BYTES  # of a received message; OSError for a longer one
        self._socket = connected
        self._received = bytearray()
        if connected.family != socket.AF_UNIX:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            _enable_keepalive(connected)

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def host(self) -> str:
        """The address of this end."""
        return str(self._socket.getsockname()[0])

    def send(self, message: bytes) -> None:
        self._socket.sendall(_LENGTH.pack(len(message)) + message)

    def receive(self, timeout: float | None = None) -> bytes | None:
        """The next message; None when no whole one has come within `timeout` seconds (0: do not
        wait)."""
        self._socket.settimeout(timeout)
        try:
            while (message := self._next()) is None:
                if not (data := self._socket.recv(1 << 16)):
                    raise EOFError("the other side closed the connection")
                self._received += data
        except (TimeoutError, BlockingIOError):
            return None
        finally:
            self._socket.settimeout(None)
        return message

    def _next(self) -> bytes | None:
        if len(self._received) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._received)
        if length > self.longest:
            raise OSError(f"a message must have at most {self.longest} bytes, got {length}")
        end = _LENGTH.size + length
        if len(self._received) < end:
            return None
        message = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        return message

    def wait_for_end(self) -> None:
        """Wait until the other side closes the connection, even if it sent what is unread."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        poll.poll()

    def shut(self) -> None:
        """End the connection for both sides, which wakes whoever waits on it."""
        with contextlib.suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def _enable_keepalive(connected: socket.socket) -> None:
    """Notice within seconds that a machine has lost power: it closes no connection."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
