"""Building csrc/: what is built, from what, with which flags, and where it is kept.

A *module* is one importable extension; a *target* is a module for one GPU architecture or one level
of a CPU's instructions. A level is a library of its own: within one, the linker would keep a single
copy of each inline function, and it could be that of another level. Each target has a directory in
the cache, named by a hash of everything that decides its machine code, so a finished library is
never stale and never overwritten.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Literal

PACKAGE = Path(__file__).parent
EXTENSION = EXTENSION_SUFFIXES[0]  # names Python's version and platform
REPORT_SECONDS = 10
# A wheel carries the sources as minisgl/csrc/src; a checkout has them in its top-level csrc/.
SOURCES = PACKAGE / "src" if (PACKAGE / "src").is_dir() else PACKAGE.parents[1] / "csrc"


class BuildError(RuntimeError):
    """A target was not built; the message says why, in its first line."""


class Unavailable(BuildError):
    """Something that building needs is not on this machine."""


@dataclass(frozen=True)
class Module:
    """One native module. `twin` says what serves in its absence, and what that costs."""

    name: str
    kind: Literal["cpu", "cuda"]
    sources: tuple[str, ...]  # relative to csrc/
    twin: str


MODULES = (
    Module(
        name="core_ops",
        kind="cpu",
        sources=("cpu/core_ops.cpp",),
        twin="token runs are compared in numpy, which makes matching a cached prefix slower",
    ),
    Module(
        name="model_ops",
        kind="cpu",
        sources=(
            "cpu/model_ops.cpp",
            "cpu/pool.cpp",
            "cpu/linear.cpp",
            "cpu/panels.cpp",
            "cpu/embedding.cpp",
            "cpu/grouped.cpp",
            "cpu/rounding.cpp",
            "cpu/moe.cpp",
            "cpu/rmsnorm.cpp",
            "cpu/activation.cpp",
            "cpu/qkv_prepare.cpp",
            "cpu/attention.cpp",
            "cpu/decode.cpp",
            "cpu/logits.cpp",
            "cpu/sampling.cpp",
            "cpu/advance.cpp",
        ),
        twin="models on the CPU run on PyTorch's operators and tokens are drawn in numpy, which "
        "makes them several times slower",
    ),
    Module(
        name="rank_ops",
        kind="cpu",
        sources=("cpu/rank_ops.cpp",),
        twin="ranks on the CPU add up through gloo's sockets, which takes several times longer",
    ),
    Module(
        name="all_reduce",
        kind="cuda",
        sources=("cuda/all_reduce.cu", "cuda/all_reduce_module.cpp"),
        twin="ranks on several GPUs add up through NCCL, which takes longer at decode sizes",
    ),
)


@dataclass(frozen=True)
class Level:
    """An instruction set: the compiler's flags for it, and what /proc/cpuinfo must list."""

    flags: tuple[str, ...] = ()
    needs: frozenset[str] = frozenset()


_V3 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"])
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

# What CPU modules are compiled for, best first. The last runs anywhere.
LEVELS = {
    "avx512_bf16": Level(
        ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"), _V4 | {"avx512_bf16", "avx512_vnni"}
    ),
    "avx512": Level(("-march=x86-64-v4",), _V4),
    "avx2": Level(("-march=x86-64-v3",), _V3),
    "portable": Level(),
}


@dataclass(frozen=True)
class Target:
    """A module and what it is compiled for: one of LEVELS, or a GPU ("80", "90a", "100")."""

    module: Module
    arch: str
    sources: Path = SOURCES

    def __post_init__(self) -> None:
        if self.module.kind == "cpu" and self.arch not in LEVELS:
            raise ValueError(f"{self.module.name} is built for {list(LEVELS)}, got {self.arch!r}")

    def __str__(self) -> str:
        return f"{self.module.name} ({'sm_' * (self.module.kind == 'cuda')}{self.arch})"

    @property
    def begins(self) -> str:
        """What is said where it is built."""
        return f"building {self} of {len(self.module.sources)} files, once on this machine"

    @property
    def flags(self) -> list[str]:
        if self.module.kind == "cpu":
            extra = ["-Wall", "-Wextra", "-fPIC", "-fvisibility=hidden", "-pthread"]
            level = [*LEVELS[self.arch].flags, f'-DLEVEL="{self.arch}"']
            return ["-std=c++20", "-O3", *level, *extra]
        gencode = f"-gencode=arch=compute_{self.arch},code=sm_{self.arch}"
        return ["-std=c++20", "-O3", gencode, "-Xcompiler=-fPIC,-fvisibility=hidden"]

    @property
    def library(self) -> Path:
        """Where the finished extension is, or will be. Unavailable: no compiler."""
        compiler = find_compiler(self.module.kind)
        status = compiler.stat()  # in place of its version: that takes a process at every start
        inputs = [
            *self.flags,
            f"{compiler.resolve()} {status.st_size} {status.st_mtime_ns}",
            EXTENSION,
        ]
        digest = hashlib.sha256("\n".join(inputs).encode())
        headers = [p for p in self.sources.rglob("*") if p.suffix in (".h", ".cuh")]
        for path in [*sorted(headers), *(self.sources / s for s in self.module.sources)]:
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        name = f"{self.module.name}-{self.arch}-{digest.hexdigest()[:16]}"
        return cache_dir() / name / (self.module.name + EXTENSION)

    def build(self, progress: Callable[[str], None]) -> Path:
        """Compile unless that has been done, by this or any other process; the library's path.
        `progress` is told every REPORT_SECONDS how far that is.

        The directory is locked meanwhile. The lock is the kernel's, so it cannot outlive its
        holders, and the compiler inherits it: a build outlives a short process that started it,
        and nobody starts it twice. BuildError carries the compiler's last lines.
        """
        library = self.library
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            with open(library.parent / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not library.exists():
                    self._compile(library, lock.fileno(), progress)
        except OSError as error:  # a folder that cannot be written, a ninja that cannot be run
            raise BuildError(f"cannot build {library}: {error}") from error
        return library

    def _compile(self, library: Path, lock: int, progress: Callable[[str], None]) -> None:
        folder = library.parent
        (folder / "build.ninja").write_text(self._ninja_file(library))
        with open(folder / "build.log", "w+") as log:
            command = [find_ninja(), "--quiet", "-C", str(folder)]
            ninja = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, pass_fds=[lock])
            while not _has_ended(ninja):
                compiled = len([*folder.glob("*.o")])
                progress(f"{compiled} of {len(self.module.sources)} files are compiled")
            if ninja.returncode == 0:
                return
            log.seek(0)
            ninja_says = ("ninja:", "FAILED:", str(find_compiler(self.module.kind)))
            lines = [line.rstrip() for line in log if not line.startswith(ninja_says)]
            raise BuildError("\n  ".join([f"building {self} failed", *lines[-8:]]))

    def _ninja_file(self, library: Path) -> str:
        compiler = str(find_compiler(self.module.kind))
        includes = ["-I", str(self.sources)]
        for path in find_headers():
            includes += ["-isystem", path]
        threads = ["-pthread"] if self.module.kind == "cpu" else []
        objects = [f"{index}.o" for index in range(len(self.module.sources))]
        # The library appears under its name in one step, whatever interrupts the link.
        lines = [
            f"compile = {_ninja_words([compiler, *self.flags, *includes])}",
            f"link = {_ninja_words([compiler, '-shared', *threads])}",
            "rule compile",
            "  command = $compile -c $in -o $out",
            "rule link",
            "  command = $link $in -o $out.partial && mv $out.partial $out",
            *(
                f"build {out}: compile {_ninja_path(self.sources / source)}"
                for out, source in zip(objects, self.module.sources, strict=True)
            ),
            f"build {_ninja_path(Path(library.name))}: link {' '.join(objects)}",
        ]
        return "\n".join(lines) + "\n"


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has, within REPORT_SECONDS."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(REPORT_SECONDS)
    return process.returncode is not None


def find_module(name: str) -> Module:
    """The module of this name. KeyError lists the names there are."""
    for module in MODULES:
        if module.name == name:
            return module
    raise KeyError(f"no native module {name!r}; there are {[m.name for m in MODULES]}")


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/minisgl/csrc`, which may be deleted at any time. Unavailable: no home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise Unavailable("no home to keep builds in (set XDG_CACHE_HOME)") from error
    return Path(base) / "minisgl" / "csrc"


def find_compiler(kind: str) -> Path:
    """The C++ or CUDA compiler. Unavailable names the places searched."""
    host = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    cuda_home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    cuda = ["nvcc", f"{cuda_home}/bin/nvcc"]
    for name in cuda if kind == "cuda" else host:
        if name and (path := shutil.which(name)):
            return Path(path)
    if kind == "cuda":
        raise Unavailable("no CUDA compiler (nvcc on PATH or in $CUDA_HOME/bin)")
    raise Unavailable("no C++ compiler ($CXX, c++, g++ or clang++)")


def find_ninja() -> str:
    """The ninja program: of this Python environment, else from PATH."""
    scripts = sysconfig.get_path("scripts")
    if found := shutil.which("ninja", path=scripts) or shutil.which("ninja"):
        return found
    raise Unavailable("no ninja (pip install ninja)")


def present_archs() -> list[str]:
    """Architectures of this machine's GPUs ("90a"); empty without a driver."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    caps = {line.strip().replace(".", "") for line in answer.stdout.splitlines() if "." in line}
    return sorted(cap + "a" if int(cap) >= 90 else cap for cap in caps)


def find_headers() -> list[str]:
    """Where Python.h and pybind11 are. Unavailable names what is missing."""
    python = sysconfig.get_path("include")
    if not Path(python, "Python.h").exists():
        raise Unavailable(f"no Python headers ({python}/Python.h: install python3-dev)")
    for package in ("pybind11", "torch"):  # torch ships pybind11's headers too
        if spec := importlib.util.find_spec(package):
            for folder in spec.submodule_search_locations or []:
                if Path(folder, "include/pybind11/pybind11.h").exists():
                    return [python, f"{folder}/include"]
    raise Unavailable("no pybind11 headers (pip install pybind11)")


@functools.cache
def cpu_level() -> str:
    """The best of LEVELS that this CPU has."""
    present: set[str] = set()
    with suppress(OSError), open("/proc/cpuinfo") as lines:  # elsewhere than on Linux: the last
        present.update(next((line.split() for line in lines if line.startswith("flags")), ()))
    return next(name for name, level in LEVELS.items() if level.needs <= present)


def _ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja_words(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")
