"""Native modules: compiled at first use in the background, while their Python twins serve.

`load("core_ops")` returns the module, or None until it is built; the caller then runs the twin, the
same function in Python. Installing compiles nothing; `python -m minisgl.csrc build` does it ahead
of time. This package imports the standard library only, so every floor may use it.
"""

import functools
import importlib.util
import threading
import time
from pathlib import Path
from types import ModuleType

from minisgl.csrc.build import (
    LEVELS,
    MODULES,
    BuildError,
    Module,
    Target,
    Unavailable,
    cpu_level,
    find_module,
)
from minisgl.log import get_logger

__all__ = [
    "LEVELS",
    "MODULES",
    "BuildError",
    "Module",
    "Target",
    "Unavailable",
    "cpu_level",
    "is_coming",
    "level_in_use",
    "load",
    "loaded",
    "use_level",
]

log = get_logger(__name__)


def load(name: str, arch: str | None = None, wait: bool = False) -> ModuleType | None:
    """The native module `name`, or None when it is not built yet or cannot be built (logged once).

    arch: for CUDA modules, as nvcc spells it ("80", "90a", "100"); for CPU modules one of LEVELS,
    by default that of `use_level`, or the best of this CPU. The first call imports a finished
    build, else starts one in a thread; later calls cost a dictionary look-up. wait=True blocks
    until the build has ended. KeyError: no such module.
    """
    unit = _unit(name, arch)
    if unit.module is None and (wait or not unit.started):
        unit.start(wait)
    return unit.module


def loaded(name: str) -> ModuleType | None:
    """The CPU module `name` if it is loaded; starts nothing."""
    return _unit(name, None).module


def is_coming(name: str) -> bool:
    """Whether the CPU module `name` is loaded, or is being built; the first call starts that."""
    load(name)
    return _unit(name, None).is_coming


def use_level(level: str) -> None:
    """Have this process load CPU modules for `level`, one of LEVELS; "auto" leaves it as it is.

    ValueError: this CPU lacks what the level needs, or modules of another are in use.
    """
    if level == "auto":
        return
    names = list(LEVELS)
    present = names[names.index(cpu_level()) :]  # each has what those behind it need
    if level not in present:
        raise ValueError(f"cpu_level must be auto or one of {present} on this CPU, got {level!r}")
    if (in_use := level_in_use(level)) != level:
        raise ValueError(f"cpu_level must be auto or {in_use}, as in use already, got {level!r}")


_level: str | None = None  # of this process's CPU modules, which are loaded once as well


def level_in_use(asked: str | None = None) -> str:
    """The level of this process: the first that was asked for, or else the CPU's best."""
    global _level
    _level = _level or asked or cpu_level()
    return _level


@functools.cache
def _unit(name: str, arch: str | None) -> "Unit":
    module = find_module(name)
    if arch is None and module.kind == "cuda":
        raise ValueError(f"{name} is a cuda module: it needs an arch")
    return Unit(Target(module, arch or level_in_use()))


class Unit:
    """One target as this process sees it: not asked for, building, loaded, or failed."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.module: ModuleType | None = None
        self.started = False
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, wait: bool) -> None:
        """Load a finished build, else build in a thread; with `wait`, return when that is done."""
        with self._lock:
            if not self.started:
                self._begin()
                self.started = True
        if wait and self._thread is not None:
            self._thread.join()

    @property
    def is_coming(self) -> bool:
        building = self._thread is not None and self._thread.is_alive()
        return self.module is not None or building

    def _begin(self) -> None:
        try:
            library = self.target.library
            if library.exists():
                self.module = import_extension(self.target.module.name, library)
                return
        except (BuildError, ImportError, OSError) as error:  # a cache that cannot be read, too
            self._report_failure(error)
            return
        # A warning, which shows where nobody has configured a log: it may take minutes.
        log.warning("%s, in the background; until then: %s", self.target.begins, self._twin)
        name = f"csrc-{self.target.module.name}"
        self._thread = threading.Thread(target=self._build, name=name, daemon=True)
        self._thread.start()

    def _build(self) -> None:
        begin = time.perf_counter()
        try:
            library = self.target.build(lambda text: log.warning("%s: %s", self.target, text))
            self.module = import_extension(self.target.module.name, library)
        except (BuildError, ImportError) as error:
            self._report_failure(error)
        else:
            log.info("built %s in %.1f s", self.target, time.perf_counter() - begin)

    def _report_failure(self, error: Exception) -> None:
        what, *compiler_lines = str(error).split("\n")
        log.warning("%s", "\n".join([f"{what}; {self._twin}", *compiler_lines]))

    @property
    def _twin(self) -> str:
        return self.target.module.twin


def import_extension(name: str, library: Path) -> ModuleType:
    """Import the extension at `library`, whose init function is named for `name`.

    pybind11 keeps the modules of a process by their names: they include the build's, or a second
    build of the same module would be the first.
    """
    spec = importlib.util.spec_from_file_location(f"{library.parent.name}.{name}", library)
    if spec is None or spec.loader is None:
        raise ImportError(f"{library} is not an extension module of this Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
