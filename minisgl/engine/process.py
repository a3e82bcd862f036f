"""The engine in its own process: starting it, watching it, and what runs inside it.

The two sides share one pair of ZeroMQ sockets in a private directory; messages are msgpack. The
child's standard input carries its boot message and then stays open: when it ends, the parent is
gone, and so is the child. Its standard error is passed on, and the end of it kept for post-mortems.
"""

import codecs
import contextlib
import faulthandler
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from importlib import import_module

import msgspec
import zmq

from minisgl.config import EngineConfig
from minisgl.engine.engine import Engine
from minisgl.engine.loop import drive
from minisgl.engine.messages import FromEngine, ToEngine
from minisgl.log import configure

LAST_LINES = 20  # of the child's standard error, quoted in the reason of its death
LAST_CHARACTERS = 4000
FLUSH_SECONDS = 2  # the child waits so long for its last messages to leave


class _Boot(msgspec.Struct, frozen=True):
    factory: str
    config: EngineConfig
    endpoint: str


class EngineProcess:
    """A child process that runs the engine which `factory(config)` builds.

    `factory` is an import path, "module:function", of a function from EngineConfig to Engine. The
    child starts to load at once; no asyncio loop is needed until a `ProcessClient` takes it over.
    """

    def __init__(self, factory: str, config: EngineConfig) -> None:
        self._directory = tempfile.mkdtemp(prefix="minisgl-")  # mode 0700: only this user connects
        endpoint = f"ipc://{self._directory}/engine"
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
        self.socket.set_hwm(0)  # never block, never drop: backlogs are bounded by admission
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.bind(endpoint)
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "minisgl.engine.process"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
        )
        facts = {name: getattr(config, name) for name in EngineConfig.__dataclass_fields__}
        boot = msgspec.msgpack.encode(_Boot(factory, EngineConfig(**facts), endpoint))
        assert self._child.stdin is not None
        self._child.stdin.write(struct.pack("<I", len(boot)) + boot)
        self._child.stdin.flush()
        self._said = ""  # the end of its standard error
        self._exit_callbacks: list[Callable[[], object]] = []
        self._lock = threading.Lock()
        self._exited = False
        self._relay = threading.Thread(target=self._pass_on_stderr, daemon=True)
        self._relay.start()
        threading.Thread(target=self._wait, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._child.pid

    def on_exit(self, callback: Callable[[], object]) -> None:
        """Call `callback` from another thread once the child has ended (at once if it has)."""
        with self._lock:
            if not self._exited:
                self._exit_callbacks.append(callback)
                return
        callback()

    def exit_reason(self) -> str:
        """How the ended child ended, with the last lines it wrote to standard error."""
        code = self._child.wait()
        how = f"exit code {code}"
        if code < 0:
            how += f" ({signal.strsignal(-code)}, signal {-code})"
        lines = [line for line in self._said.splitlines() if line.strip()][-LAST_LINES:]
        said = "; its last lines were:\n" + "\n".join(lines) if lines else ""
        return f"the engine process ended with {how}{said}"

    def kill(self) -> None:
        """End the child now, if it still runs."""
        self._child.kill()

    def close(self) -> None:
        """Kill the child and remove its directory. Idempotent."""
        self.kill()
        self._child.wait()
        self.socket.close(linger=0)
        if self._child.stdin is not None:
            self._child.stdin.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _pass_on_stderr(self) -> None:
        assert self._child.stderr is not None
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        while data := os.read(self._child.stderr.fileno(), 1 << 16):
            text = decode(data)
            self._said = (self._said + text)[-LAST_CHARACTERS:]
            sys.stderr.write(text)
            sys.stderr.flush()

    def _wait(self) -> None:
        self._child.wait()
        self._relay.join(timeout=0.5)  # grandchildren may hold standard error open for longer
        with self._lock:
            self._exited = True
        for callback in self._exit_callbacks:
            callback()


def main() -> int:
    """The child: build the engine the boot message names, serve it, say how it went."""
    faulthandler.enable()
    for number in (signal.SIGINT, signal.SIGTERM):  # these reach the group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    stdin = sys.stdin.buffer
    (size,) = struct.unpack("<I", stdin.read(4))
    boot = msgspec.msgpack.decode(stdin.read(size), type=_Boot)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
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


def _leave_with_parent() -> None:
    os.read(0, 1)  # returns at end of file only: the parent sends nothing after the boot message
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
