"""The engine in its own process: starting it, and what runs inside it.

The two sides share one pair of ZeroMQ sockets in a private directory; messages are msgpack.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module

import msgspec
import zmq

from minisgl.child import Child, read_boot
from minisgl.config import EngineConfig
from minisgl.engine.engine import Engine
from minisgl.engine.loop import drive
from minisgl.engine.messages import FromEngine, ToEngine
from minisgl.log import configure

FLUSH_SECONDS = 2  # the child waits so long for its last messages to be sent


class _Boot(msgspec.Struct, frozen=True):
    factory: str
    config: EngineConfig
    endpoint: str


class EngineProcess(Child):
    """A child process that runs the engine which `factory(config)` builds.

    `factory` is an import path, "module:function", of a function from EngineConfig to Engine. The
    child starts to load at once; no asyncio loop is needed until a `ProcessClient` takes it over.
    """

    def __init__(self, factory: str, config: EngineConfig) -> None:
        self._directory = _private_directory()  # removed by `close`, at exit at the latest
        endpoint = f"ipc://{self._directory.name}/engine"
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self.socket.set_hwm(0)  # never block, never drop: backlogs are bounded by admission
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(endpoint)
        boot = msgspec.msgpack.encode(_Boot(factory, config, endpoint))
        super().__init__("minisgl.engine.process", boot)

    def close(self) -> None:
        """Kill the child and remove its directory. Idempotent."""
        super().close()
        self.socket.close(linger=0)
        self._directory.cleanup()


def _private_directory() -> tempfile.TemporaryDirectory[str]:
    """A new directory of mode 0700, so that only this user can connect to the socket in it.

    In /tmp where $TMPDIR is longer than a socket's name may be.
    """
    parent = tempfile.gettempdir()
    if len(os.fsencode(f"{parent}/minisgl-12345678/engine")) > zmq.IPC_PATH_MAX_LEN:
        parent = "/tmp"
    return tempfile.TemporaryDirectory(prefix="minisgl-", dir=parent, ignore_cleanup_errors=True)


def main() -> int:
    """The child: build and serve the engine the boot message names. Returns the exit code."""
    boot = msgspec.msgpack.decode(read_boot(), type=_Boot)
    configure(boot.config.log_level, "engine")

    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)
    socket.connect(boot.endpoint)
    encoder = msgspec.msgpack.Encoder()
    decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)

    def build() -> Engine:
        module, _, function = boot.factory.partition(":")
        make: Callable[[EngineConfig], Engine] = getattr(import_module(module), function)
        return make(boot.config)

    def receive(timeout: float) -> list[ToEngine]:
        messages: list[ToEngine] = []
        if timeout and not socket.poll(int(timeout * 1000)):
            return messages
        with contextlib.suppress(zmq.Again):
            while True:
                messages.append(decoder.decode(socket.recv(zmq.NOBLOCK)))
        return messages

    def send(message: FromEngine) -> None:
        socket.send(encoder.encode(message))

    ended_well = drive(build, receive, send)
    socket.close(linger=FLUSH_SECONDS * 1000)
    context.term()
    return 0 if ended_well else 1


if __name__ == "__main__":
    sys.exit(main())
