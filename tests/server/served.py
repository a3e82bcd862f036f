"""A server process, for tests that need the whole of it."""

import contextlib
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from resource import RLIMIT_NOFILE, setrlimit

import openai

from tests.server.templates import HERMES

ROOT = Path(__file__).parents[2]
PATIENCE = 180  # seconds, for machines that do much else


def calling_model(parent: Path) -> Path:
    """The bundled model in a folder of its own, with a chat template that knows tools."""
    folder = shutil.copytree(ROOT / "minisgl/assets/tiny", parent / "tiny")
    (folder / "chat_template.jinja").write_text(HERMES)
    return folder


class Served:
    """A server process on a free port, its output read as it comes."""

    def __init__(
        self,
        *flags: str,
        module: str = "minisgl.serve",
        python: str | Path = sys.executable,
        descriptors: tuple[int, int] | None = None,  # soft and hard limit
    ) -> None:
        self.process = subprocess.Popen(
            [
                python,
                "-m",
                module,
                "--device=cpu",
                "--max-total-tokens=65536",
                "--port=0",
                *flags,
            ],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=descriptors and (lambda: setrlimit(RLIMIT_NOFILE, descriptors)),
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_ready(self) -> str:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            if found := re.search(r"serving .* at (http://\S+)/v1", self.output):
                return found[1]
            time.sleep(0.02)
        raise AssertionError(f"the server did not get ready:\n{self.output}")

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.wait_ready()}/v1", api_key="x", max_retries=0, timeout=PATIENCE
        )

    def engine_pid(self) -> int:
        found = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)],
            capture_output=True,
            text=True,
        ).stdout
        (line,) = (line for line in found.splitlines() if "minisgl.engine.process" in line)
        return int(line.split()[0])

    def wait_exit(self) -> int:
        code = self.process.wait(PATIENCE)
        self._reader.join(5)
        return code

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
