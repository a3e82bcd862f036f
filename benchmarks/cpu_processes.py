"""The engines of `benchmarks.cpu`: processes that wait stopped while another is asked.

An `Offline` engine is asked over its standard input (`cpu_engines.py`, `cpu_llamacpp.mjs`), a
`Served` one over HTTP. An engine that has answered may keep a core busy for seconds, waiting for
the next question: vLLM's processes made OpenVINO's steps beside them take 20 times as long. So
whoever waits is stopped, but for a server given by its URL, which is not ours.
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.http_load import Client, Job, Outcome
from minisgl.csrc import cpu_level

START_SECONDS = 600  # vLLM compiles for more than a minute
SHORT = [*range(16, 48)]  # what a woken engine is asked first
# How engines serve: the module and its options, with the limits that they have offline.
SERVERS = {
    "minisgl": ("minisgl.serve", "--device cpu"),
    "vllm": (
        "vllm.entrypoints.openai.api_server",
        "--max-model-len 2560 --max-num-seqs 256 --disable-uvicorn-access-log",
    ),
}


@dataclass(frozen=True)
class Side:
    """What is compared: NAME[=PYTHON[:MODEL]] or NAME=URL, minisgl from one tree or another.

    llama.cpp's `python` is the folder that node-llama-cpp was installed in. bits: of most weights;
    flags: minisgl's own."""

    name: str
    engine: str
    python: str
    tree: Path
    model: str
    url: str | None = None
    bits: int = 16
    flags: Mapping[str, str] = field(default_factory=dict)

    def options(self) -> dict[str, str]:
        """Of the command, minisgl's own or vLLM's: without AVX-512 its bf16 is slower than fp32."""
        if self.engine != "vllm":
            return dict(self.flags)
        return {"dtype": "bfloat16" if cpu_level().startswith("avx512") else "float32"}

    def environment(self) -> dict[str, str]:
        """What the engine's documents set for its best speed on all cores."""
        found = {**os.environ, "PYTHONPATH": str(self.tree)}
        if self.engine == "vllm":
            found.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
            found.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{(os.cpu_count() or 1) - 1}")
            found.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
            found.setdefault("LD_PRELOAD", ":".join(map(str, self._preloaded())))
        return found

    def _preloaded(self) -> list[Path]:
        """An allocator, and the OpenMP that vLLM's wheel brings."""
        wanted = [
            (Path("/usr/lib"), "*/libtcmalloc_minimal.so.4"),
            (Path(self.python).parent.parent, "lib/libiomp5.so"),
        ]
        found = [next(folder.glob(name), None) for folder, name in wanted]
        for (_, name), path in zip(wanted, found, strict=True):
            if path is None:
                print(f"{self.name} runs without {Path(name).name}, which its documents recommend")
        return [path for path in found if path is not None]

    def offline(self) -> list[str]:
        """The command that answers questions on its standard input."""
        here = Path(__file__).parent
        if self.engine == "llamacpp":
            return ["node", str(here / "cpu_llamacpp.mjs"), self.python, self.model]
        flags = [f"{name}={value}" for name, value in self.options().items()]
        return [self.python, str(here / "cpu_engines.py"), self.engine, self.model, *flags]

    def server(self, port: int) -> list[str]:
        """The command that serves, of an engine in SERVERS."""
        module, options = SERVERS[self.engine]
        own = {"model": self.model, "port": str(port), **self.options()}
        words = [word for name, value in own.items() for word in (f"--{name}", value)]
        return [self.python, "-m", module, *options.split(), *words]


class Engine(Protocol):
    """What a row is measured with, between `awake` and its end."""

    name: str
    release: str

    def awake(self) -> AbstractContextManager[None]:
        """Lets it run. It has then answered a short question, which nobody times."""

    def seconds(self, prompts: list[list[int]], outputs: list[int]) -> float:
        """How long it takes to give each prompt its output, of exactly so many tokens."""

    def close(self) -> None:
        """Ends what was started for it."""


class Process:
    """A command in a session of its own, which can be stopped."""

    def __init__(self, side: Side, command: Sequence[str], *, stdout: int | None = None) -> None:
        self._name = side.name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115, it is closed with the process
        self.popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._log if stdout is None else stdout,
            stderr=self._log,
            text=True,
            env=side.environment(),
            cwd=side.tree,
            start_new_session=True,  # some have processes of their own, which end with it
        )

    def signal(self, number: int) -> None:
        for pid in family(self.popen.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def ended(self) -> SystemExit:
        """What to raise when it has ended by itself."""
        self._log.seek(0)
        last = "".join(self._log.readlines()[-20:])
        return SystemExit(f"{last}{self._name} has ended: rc {self.popen.wait()}")

    def close(self) -> None:
        self.signal(signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)  # those that have lost their parent
        self.popen.wait()
        self._log.close()


class Offline:
    """An engine within a Python of its own, that has loaded the model and waits for questions."""

    def __init__(self, side: Side) -> None:
        self.name = side.name
        self._process = Process(side, side.offline(), stdout=subprocess.PIPE)
        try:
            self.release = str(self._answer()["release"])
        except BaseException:  # Ctrl-C, too
            self._process.close()
            raise
        self._process.signal(signal.SIGSTOP)

    @contextmanager
    def awake(self) -> Iterator[None]:
        self._process.signal(signal.SIGCONT)
        self.seconds([SHORT], [1])
        yield
        self._process.signal(signal.SIGSTOP)

    def seconds(self, prompts: list[list[int]], outputs: list[int]) -> float:
        pipe = self._process.popen.stdin
        assert pipe is not None
        print(json.dumps({"prompts": prompts, "outputs": outputs}), file=pipe, flush=True)
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, float | str]:
        pipe = self._process.popen.stdout
        assert pipe is not None
        line = pipe.readline()
        if not line:
            raise self._process.ended()
        found: dict[str, float | str] = json.loads(line)
        return found

    def close(self) -> None:
        self._process.close()


class Served:
    """A server that others have started: what it uses while it waits is not in our hands."""

    def __init__(self, name: str, url: str) -> None:
        self.name, self.release = name, "unknown"
        self._client = Client(url)

    @contextmanager
    def awake(self) -> Iterator[None]:
        if (fault := self.fault()) is not None:
            raise SystemExit(f"{self.name}: {fault}")
        yield

    def fault(self) -> str | None:
        """Why it does not serve, if so."""

        async def ask() -> str | None:
            await self._client.find_model()
            return (await self._client.send(Job(SHORT, 1), time.perf_counter())).error

        try:
            return asyncio.run(ask())
        except (OSError, ValueError, LookupError) as error:
            return f"{type(error).__name__}: {error}"

    def outcomes(self, jobs: list[Job], clients: int) -> tuple[list[Outcome], float]:
        """What so many clients in a closed loop saw, and the seconds it took."""
        began = time.perf_counter()
        outcomes = asyncio.run(self._client.closed_loop(jobs, clients))
        seconds = time.perf_counter() - began
        for outcome in outcomes:
            if outcome.error is not None:
                raise SystemExit(f"{self.name}: {outcome.error}")
        return outcomes, seconds

    def seconds(self, prompts: list[list[int]], outputs: list[int]) -> float:
        jobs = [Job(prompt, count) for prompt, count in zip(prompts, outputs, strict=True)]
        return self.outcomes(jobs, len(jobs))[1]

    def close(self) -> None:
        """Nothing: it is not ours."""


class OwnServer(Served):
    """A server that is started here."""

    def __init__(self, side: Side) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        super().__init__(side.name, f"http://127.0.0.1:{port}")
        self._process = Process(side, side.server(port))
        try:
            with self.awake():
                pass
        except BaseException:  # Ctrl-C, too
            self._process.close()
            raise

    @contextmanager
    def awake(self) -> Iterator[None]:
        self._process.signal(signal.SIGCONT)
        end = time.monotonic() + START_SECONDS
        while (fault := self.fault()) is not None:  # it starts, or notices that it goes on
            if self._process.popen.poll() is not None:
                raise self._process.ended()
            if time.monotonic() > end:
                raise SystemExit(f"{self.name} does not serve: {fault}")
            time.sleep(0.1)
        yield
        self._process.signal(signal.SIGSTOP)

    def close(self) -> None:
        self._process.close()


def family(pid: int) -> list[int]:
    """A process and all that descend from it, those that are alive."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if (fields := _stat(int(folder.name))) is not None:
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def cpu_seconds() -> tuple[float, float]:
    """Of all programs, and of this one with its children that are alive."""
    tick = os.sysconf("SC_CLK_TCK")
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    everyone = sum(map(int, fields)) - int(fields[3]) - int(fields[4])  # less idle, and waiting
    stats = [stat for stat in map(_stat, family(os.getpid())) if stat is not None]
    return everyone / tick, sum(int(stat[11]) + int(stat[12]) for stat in stats) / tick


def _stat(pid: int) -> list[str] | None:
    """The fields of a process's line behind its name: state, parent, ... None when it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
