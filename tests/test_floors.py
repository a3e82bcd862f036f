"""The shape of the house: who may import whom, what may not be imported at all, and sizes.

The source is read as syntax trees, so late and type-only imports count. Each rule is also shown
to catch a violation planted in a copy.
"""

import ast
import io
import re
import subprocess
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path
from tokenize import COMMENT, DEDENT, ENDMARKER, INDENT, NEWLINE, NL

import pytest

ROOT = Path(__file__).parents[1]
# The package's files are shorter than those beside it, of which data and documents may be longer.
MAX_FILE_LINES = dict.fromkeys(("tests", "benchmarks", "profiles", "tools", "csrc"), 500)
MAX_FILE_LINES["minisgl"] = 400
SOURCES = {".py", ".mjs", ".sh", ".c", ".h", ".cpp", ".cu", ".cuh"}
MAX_FUNCTION_LINES = 60  # in the package; jitted kernels and what launches them may be longer
# What is longer than its limit, with its size: may shrink, not grow, and is to be empty.
ALLOWED: dict[str, int] = {}
# Lines of code (blank lines, comments and docstrings are free). The kernels have a budget of their
# own, because a kernel's room holds its specification, cases and cost formulas too.
BUDGETS = {"kernels/": 6_977, "all but kernels/": 16_265}

# Room (a folder or file of minisgl/) -> what it may import from the package besides itself:
# rooms, or single modules of a room.
BASE = {"log", "config", "csrc", "child", "interrupts", "libraries"}
DEVICE = BASE | {"device", "kernels", "trace"}
MODELS = DEVICE | {"parallel", "layers", "models", "gguf"}
PLANS = {"core.batch", "core.request", "core.executor", "core.grammar"}  # data and protocols
FLOORS: dict[str, set[str]] = {
    "__init__": {"llm", "completion", "core.request"},  # by name, at first use
    "log": set(),
    "interrupts": set(),
    "trace": set(),
    "csrc": {"log"},
    "libraries": set(),
    "child": {"libraries"},
    "config": {"log"},
    "flags": {"config", "__init__"},
    "core": BASE,
    "device": BASE | {"trace"},
    "kernels": BASE | {"device", "trace"},
    "parallel": DEVICE,
    "layers": DEVICE | {"parallel"},
    "gguf": set(),
    "models": DEVICE | {"parallel", "layers", "gguf"},
    "step": MODELS | PLANS,
    "start": MODELS | PLANS | {"step"},
    "ranks": MODELS | PLANS | {"step", "start"},
    "engine": BASE | {"core", "trace"},
    "grammar": BASE | {"core.grammar"},
    "server": BASE | {"engine.client", "core.executor", "core.request", "gguf"},
    "build": MODELS | {"step", "start", "ranks", "engine", "core", "grammar", "server.tokenizer"},
}
TOP = {"serve", "chat", "llm", "completion", "analyze"}  # what people run: may import everything

HTTP = {"starlette", "uvicorn", "uvloop", "h11", "prometheus_client"}
PURE = {"numpy", "msgspec"}
# Packages only some rooms may import; a room not listed may not, late or not.
PACKAGES: dict[str, set[str]] = {
    **{package: {"server", "serve"} for package in HTTP},
    "triton": {"kernels", "device"},
    "nvtx": {"trace"},
    "llguidance": {"grammar"},
    "gguf": {"gguf"},
}
STDLIB_ONLY = {"log", "csrc", "config", "flags", "child", "interrupts", "libraries", "__init__"}
LATE_ONLY = {"transformers", "nvtx", "cuda"}  # optional at run time: inside functions only
NEVER = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}  # these run what they read
NEVER_CALLED = {"load": "torch", "send_pyobj": None, "recv_pyobj": None}  # pickle inside
# Variables that say where things are, or that other libraries read. There are no feature flags.
ENVIRONMENT = {
    "libraries.py": {"OMP_WAIT_POLICY"},
    "device/cpu.py": {"OMP_NUM_THREADS"},
    "csrc/build.py": {"CXX", "CUDA_HOME", "XDG_CACHE_HOME"},
}

MODULE_NAME = re.compile(r"minisgl(\.\w+)+(:\w+)?")  # "minisgl.kernels.x:f", loaded by name


def imports(tree: ast.Module, module: list[str], is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in a file, by statement or by name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module[: len(module) - node.level + is_package]
                base = ".".join([*parent, base]).rstrip(".")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and MODULE_NAME.fullmatch(node.value)
        ):
            yield node.lineno, node.value.replace(":", ".")


def late_lines(tree: ast.Module) -> set[int]:
    """Lines of imports that run only when a function does, or never (TYPE_CHECKING)."""
    scopes = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    return {
        inner.lineno
        for scope in scopes
        for inner in ast.walk(scope)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    }


def import_faults(room: str, name: str, late: bool) -> Iterator[str]:
    """What is wrong with importing `name` in `room`."""
    top, *rest = name.split(".")
    if top == "minisgl":
        target, inside = (rest[0] if rest else "__init__"), ".".join(rest[:2])
        allowed = FLOORS.get(room)
        if target in ("__version__", "py") or target == room or room in TOP:
            return
        if allowed is None:
            yield f"room {room!r} is not in the floor table"
        elif target not in allowed and inside not in allowed:
            yield f"{room} may not import {name}"
        return
    if name in ("os.environ", "os.getenv"):
        yield f"write {name} in full, so that its reads can be found"
    if top in NEVER:
        yield f"{name} runs what it reads; use msgspec or safetensors"
    if top in LATE_ONLY and not late:
        yield f"{top} is optional: import it inside the function that needs it"
    if top in PACKAGES and room not in PACKAGES[top]:
        yield f"{room} may not import {top}; only {sorted(PACKAGES[top])} may"
    standard = top in sys.stdlib_module_names
    if room in STDLIB_ONLY and not standard:
        yield f"{room} may import the standard library only, not {top}"
    if room == "core" and not standard and top not in PURE:
        yield f"core may import the standard library, numpy and msgspec, not {top}"


def environment_faults(node: ast.AST, path: str) -> Iterator[str]:
    """Reads of environment variables that the table does not name."""
    text = ast.unparse(node) if isinstance(node, ast.Call | ast.Subscript | ast.Compare) else ""
    read = re.match(r"os\.(?:getenv\(|environ(?:\[|\.\w+\())(.*)", text)
    within = re.search(r"(.*) (?:not )?in os\.environ$", text)
    if read or within:
        name = re.match(r"'(\w+)'", (read or within)[1])
        if name is None or name[1] not in ENVIRONMENT.get(path, ()):
            yield f"{text}: the environment holds no feature flags; use the config"


def call_faults(node: ast.AST) -> Iterator[str]:
    """Calls and names that are refused wherever they stand."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner = NEVER_CALLED.get(node.func.attr, "-")
        if owner is None or ast.unparse(node.func.value) == owner:
            yield f"{ast.unparse(node.func)} unpickles"
    named = [
        getattr(node, "arg", None),
        getattr(node, "id", None),
        getattr(node, "value", None) if isinstance(node, ast.Constant) else None,
    ]
    if "trust_remote_code" in named:
        yield "trust_remote_code: a checkpoint's own code is never run"


def code_lines(tree: ast.Module, source: str) -> int:
    """Lines that hold code: not blank, and neither comment nor docstring."""
    silent = {NL, NEWLINE, INDENT, DEDENT, COMMENT, ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is jitted, or launches what is: `kernel[grid](...)`."""
    return any(re.match(r"\w+\.jit\b", ast.unparse(d)) for d in function.decorator_list) or any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        for node in ast.walk(function)
    )


def lengths(root: Path) -> Iterator[tuple[str, int, int]]:
    """(name, lines, most) of every source file, and of every function of the package."""
    for folder, most in MAX_FILE_LINES.items():
        for path in sorted((root / folder).rglob("*")):
            if path.suffix not in SOURCES or path.is_symlink():
                continue
            name, source = path.relative_to(root).as_posix(), path.read_text()
            yield name, len(source.splitlines()), most
            if folder != "minisgl" or path.suffix != ".py":
                continue
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    lines = (node.end_lineno or 0) - node.lineno + 1
                    if not (name.startswith("minisgl/kernels/") and is_kernel(node)):
                        yield f"{name}: {node.name}", lines, MAX_FUNCTION_LINES


def length_faults(root: Path) -> Iterator[str]:
    for name, lines, most in lengths(root):
        if lines > ALLOWED.get(name, most):
            yield f"{name}: {lines} lines; it may have at most {ALLOWED.get(name, most)}"


def violations(root: Path) -> list[str]:
    """Everything that breaks a rule in the package below `root`, as "path:line: what"."""
    package, found, totals = root / "minisgl", [], dict.fromkeys(BUDGETS, 0)
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        where, source = relative.as_posix(), path.read_text()
        tree = ast.parse(source)
        module = ["minisgl", *relative.with_suffix("").parts]
        is_package = module[-1] == "__init__"
        if is_package:
            module.pop()
        room = relative.parts[0].removesuffix(".py")
        late = late_lines(tree)
        for line, name in imports(tree, module, is_package):
            found += [f"{where}:{line}: {w}" for w in import_faults(room, name, line in late)]
        for node in ast.walk(tree):
            line = getattr(node, "lineno", 0)
            wrong = [*environment_faults(node, where), *call_faults(node)]
            found += [f"{where}:{line}: {w}" for w in wrong]
        totals["kernels/" if room == "kernels" else "all but kernels/"] += code_lines(tree, source)
    for part, total in totals.items():
        if total > BUDGETS[part]:
            found.append(f"{part}: {total} lines of code; the budget is {BUDGETS[part]}")
    return [*found, *length_faults(root)]


def test_the_house_stands():
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_nothing_is_allowed_that_need_not_be():
    long = {name for name, lines, most in lengths(ROOT) if lines > most}
    assert set(ALLOWED) - long == set()


LONG = "def f():\n" + "    x = 1\n" * 59 + "    pass"
PLANTED = [
    ("core/x.py", "import torch", "core may import"),
    ("core/x.py", "def f():\n    import torch.nn", "core may import"),
    ("core/x.py", "from minisgl.engine import engine", "core may not import minisgl.engine"),
    ("core/x.py", "from ..step.runner import Runner", "core may not import minisgl.step"),
    ("core/x.py", "from .. import server", "core may not import minisgl.server"),
    (
        "core/x.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from minisgl.layers import norm",
        "core may not import minisgl.layers",
    ),
    ("step/x.py", "from minisgl.core.scheduler import S", "step may not import"),
    ("start/x.py", "from minisgl.core import radix", "start may not import"),
    ("ranks/x.py", "import minisgl.core.kvcache as k", "ranks may not import"),
    (
        "step/x.py",
        "from minisgl.start.load import load_worker",
        "step may not import minisgl.start",
    ),
    (
        "step/x.py",
        "def f():\n    from minisgl.ranks import node",
        "step may not import minisgl.ranks",
    ),
    ("start/x.py", "from ..ranks.channel import Boot", "start may not import minisgl.ranks"),
    ("models/x.py", "from minisgl.start import footprint", "models may not import"),
    ("kernels/x.py", "from minisgl.core.batch import Batch", "kernels may not import"),
    ("kernels/x.py", "P = 'minisgl.layers.norm:rms'", "kernels may not import"),
    ("models/x.py", "from minisgl.step import kv_pool", "models may not import"),
    ("engine/x.py", "from minisgl.step.worker import W", "engine may not import"),
    ("server/x.py", "from minisgl.core.scheduler import S", "server may not import"),
    ("server/x.py", "from minisgl.engine.engine import Engine", "server may not import"),
    ("build.py", "def f():\n    from minisgl.server.app import app", "build may not import"),
    ("newroom/x.py", "from minisgl.core import batch", "not in the floor table"),
    ("engine/x.py", "import uvicorn", "may not import uvicorn"),
    ("llm.py", "def f():\n    import starlette", "may not import starlette"),
    ("layers/x.py", "import triton.language as tl", "may not import triton"),
    ("engine/x.py", "def f():\n    import nvtx", "may not import nvtx"),
    ("core/x.py", "from minisgl.trace import span", "core may not import minisgl.trace"),
    ("server/x.py", "import transformers", "transformers is optional"),
    ("kernels/x.py", "from cuda.bindings import driver", "cuda is optional"),
    ("csrc/x.py", "import numpy", "standard library only"),
    ("engine/x.py", "import pickle", "runs what it reads"),
    ("models/x.py", "import torch\nw = torch.load('x')", "unpickles"),
    ("engine/x.py", "def f(s):\n    s.send_pyobj(1)", "unpickles"),
    ("server/x.py", "def f(A):\n    A(trust_remote_code=True)", "never run"),
    ("models/x.py", "K = {'trust_remote_code': True}", "never run"),
    ("step/x.py", "import os\nF = os.environ.get('FAST')", "no feature flags"),
    ("step/x.py", "import os\nF = os.getenv('FAST')", "no feature flags"),
    ("step/x.py", "import os\nif 'FAST' in os.environ:\n    x = 1", "no feature flags"),
    ("step/x.py", "import os\nos.environ['FAST'] = '1'", "no feature flags"),
    ("start/x.py", "from os import environ", "write os.environ"),
    ("csrc/build.py", "import os\nF = os.environ.get('FAST')", "no feature flags"),
    ("core/x.py", "x = 1\n" * 401, "401 lines; it may have at most 400"),
    ("core/x.py", LONG, "x.py: f: 61 lines; it may have at most 60"),
    ("core/x.py", f"class C:\n{textwrap.indent(LONG, '    ')}", "x.py: f: 61 lines"),
    ("core/x.py", f"@triton.jit\n{LONG}", "x.py: f: 61 lines"),
    ("kernels/x.py", f"@cached\n{LONG}", "x.py: f: 61 lines"),
    ("kernels/x.py", LONG.replace("pass", "kernel(1)"), "x.py: f: 61 lines"),
]


@pytest.mark.parametrize(("path", "source", "expected"), PLANTED)
def test_a_planted_violation_is_caught(tmp_path, path, source, expected):
    file = tmp_path / "minisgl" / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    found = violations(tmp_path)
    assert len(found) >= 1
    assert all(expected in line for line in found), found


@pytest.mark.parametrize("path", ["tests/core/x.py", "csrc/cuda/x.cu", "profiles/x.sh"])
def test_files_outside_the_package_are_short_too(tmp_path, path):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text("x\n" * 500)
    file.with_suffix(".json").write_text("x\n" * 501)
    assert violations(tmp_path) == []
    file.write_text("x\n" * 501)
    assert violations(tmp_path) == [f"{path}: 501 lines; it may have at most 500"]


def test_what_is_too_long_today_may_not_grow(tmp_path, monkeypatch):
    monkeypatch.setitem(ALLOWED, "minisgl/core/x.py", 410)
    file = tmp_path / "minisgl/core/x.py"
    file.parent.mkdir(parents=True)
    file.write_text("x = 1\n" * 410)
    assert violations(tmp_path) == []
    file.write_text("x = 1\n" * 411)
    assert violations(tmp_path) == ["minisgl/core/x.py: 411 lines; it may have at most 410"]


@pytest.mark.parametrize(("part", "room"), [("kernels/", "kernels"), ("all but kernels/", "core")])
def test_the_line_budgets_are_counted(tmp_path, monkeypatch, part, room):
    monkeypatch.setitem(BUDGETS, part, 1200)
    folder = tmp_path / "minisgl" / room
    folder.mkdir(parents=True)
    for index in range(3):
        (folder / f"x{index}.py").write_text("x = 1\n" * 390)
    last = folder / "last.py"
    last.write_text("x = 1\n" * 30 + '"""Free."""\n\n# free\n')
    assert violations(tmp_path) == []
    last.write_text("x = 1\n" * 31)
    assert ["the budget is" in line for line in violations(tmp_path)] == [True]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "core/x.py",
            "import numpy\nimport msgspec\nfrom minisgl import csrc\nfrom . import pages",
        ),
        ("step/x.py", "import torch\nfrom minisgl.core.batch import Batch"),
        ("start/x.py", "from minisgl.step.worker import Worker"),
        ("ranks/x.py", "from minisgl.start.load import L\nfrom minisgl.step import executor"),
        ("server/x.py", "def f():\n    import transformers"),
        ("trace.py", "def f():\n    import nvtx"),
        ("engine/x.py", "import os\nenv = {**os.environ, 'A': '1'}"),
        ("csrc/build.py", "import os\nx = os.environ.get('CXX')"),
        ("llm.py", "from minisgl.server.text import T\nfrom minisgl.step import worker"),
        ("core/x.py", LONG.replace("    pass", "")),
        ("kernels/x.py", f"@triton.jit(do_not_specialize=['n'])\n{LONG}"),
        ("kernels/x.py", LONG.replace("pass", "kernel[(1,)](1)")),
    ],
)
def test_what_is_allowed_passes(tmp_path, path, source):
    file = tmp_path / "minisgl" / path
    file.parent.mkdir(parents=True)
    file.write_text(source)
    assert violations(tmp_path) == []


# ---- the same, shown by running --------------------------------------------------------------

IMPORT_ROOMS = """
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"{{name}} is absent in this test", name=name)

sys.meta_path.insert(0, Absent())
for room in {rooms!r}:
    module = importlib.import_module(room)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), room + "."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)
print(*sorted(sys.modules))
"""


def import_in_new_process(rooms: list[str], absent: set[str] | None = None) -> set[str]:
    """Import rooms with everything below them; the names of all modules then loaded."""
    there = [r for r in rooms if (ROOT / r.replace(".", "/")).with_suffix(".py").exists()]
    there += [r for r in rooms if (ROOT / r.replace(".", "/")).is_dir()]
    code = textwrap.dedent(IMPORT_ROOMS).format(rooms=there, absent=absent or set())
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_minisgl_imports_nothing_heavy():
    code = "import sys, minisgl; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert not {"torch", "numpy", "msgspec", "asyncio", "logging"} & set(done.stdout.split())


def test_core_and_csrc_run_without_torch():
    loaded = import_in_new_process(["minisgl.core", "minisgl.csrc"], absent={"torch", "triton"})
    assert "minisgl.core.request" in loaded


def test_kernels_and_the_offline_engine_need_no_server_packages():
    rooms = "kernels device parallel layers models step start ranks engine build llm"
    loaded = import_in_new_process(
        [f"minisgl.{room}" for room in rooms.split()], absent=HTTP | LATE_ONLY
    )
    assert "minisgl.kernels.op" in loaded


def test_the_server_starts_without_transformers():
    loaded = import_in_new_process(["minisgl.server", "minisgl.serve"])
    assert "transformers" not in loaded


def test_a_chat_needs_no_transformers():
    code = """
        import sys
        sys.modules["transformers"] = None  # importing it raises
        from minisgl import LLM, SamplingParams
        with LLM(max_total_tokens=1024, log_level="warning") as llm:
            answer = llm.chat([{"role": "user", "content": "Hello"}], SamplingParams(max_tokens=4))
        assert answer.token_ids
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
