"""A child process of this Python: started with a boot message, watched, ended with its parent.

The child's standard input carries the boot message and then stays open. When it is closed, the
parent has ended, and the child exits. Its standard error is passed on, and its last lines are kept
for the reason of its exit.
"""

import codecs
import contextlib
import faulthandler
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

from minisgl.libraries import settings

LAST_LINES = 20  # of the child's standard error, quoted in its exit reason
LAST_CHARACTERS = 4000


class Child:
    """`python -m module` with `boot`, which it reads with `read_boot`; `fds` stay open in it."""

    def __init__(self, module: str, boot: bytes, fds: Sequence[int] = ()) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**settings(), "PYTHONPATH": path},
            pass_fds=fds,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(struct.pack("<I", len(boot)) + boot)
        self._process.stdin.flush()
        self._last_output = ""  # of its standard error
        self._ended: Future[None] = Future()
        self._relay = threading.Thread(target=self._pass_on_stderr, daemon=True)
        self._relay.start()
        threading.Thread(target=self._wait, daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def on_exit(self, callback: Callable[[], object]) -> None:
        """Call `callback` from another thread once the child has ended (at once if it has)."""
        self._ended.add_done_callback(lambda _: callback())

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the child has ended, waiting up to `timeout` seconds for it."""
        return bool(wait([self._ended], timeout).done)

    def exit_reason(self, name: str) -> str:
        """How the ended child ended, with the last lines it wrote to standard error."""
        code = self._process.wait()
        how = f"exit code {code}"
        if code < 0:
            how += f" ({signal.strsignal(-code)}, signal {-code})"
        lines = [line for line in self._last_output.splitlines() if line.strip()][-LAST_LINES:]
        said = "; its last lines were:\n" + "\n".join(lines) if lines else ""
        return f"{name} ended with {how}{said}"

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the number of the signal that ended it."""
        return self._process.poll()

    def kill(self) -> None:
        """End the child now, if it still runs."""
        self._process.kill()

    def close(self) -> None:
        """Kill the child and wait for its end. Idempotent."""
        self.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _pass_on_stderr(self) -> None:
        assert self._process.stderr is not None
        decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        while data := os.read(self._process.stderr.fileno(), 1 << 16):
            text = decode(data)
            self._last_output = (self._last_output + text)[-LAST_CHARACTERS:]
            # Our standard error may be closed. Keep reading: a full pipe would block the child.
            with contextlib.suppress(OSError, ValueError, AttributeError):
                sys.stderr.write(text)
                sys.stderr.flush()

    def _wait(self) -> None:
        self._process.wait()
        self._relay.join(timeout=0.5)  # grandchildren may hold standard error open for longer
        self._ended.set_result(None)


def read_boot() -> bytes:
    """In the child: its boot message. From now on the child exits when its parent does, and ignores
    SIGINT and SIGTERM, which a terminal sends to both: the parent decides."""
    faulthandler.enable()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    stdin = sys.stdin.buffer
    (size,) = struct.unpack("<I", stdin.read(4))
    boot = stdin.read(size)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    return boot


def _leave_with_parent() -> None:
    os.read(0, 1)  # returns at end of file only: the parent sends nothing after the boot message
    os._exit(1)
