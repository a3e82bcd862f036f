"""What the documents say exists: linked files, flags, modules and the Python they show."""

import ast
import json
import re
from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from triton.runtime.jit import JITFunction

import minisgl
from benchmarks.kernels.goals import goals
from benchmarks.kernels.report import prediction
from minisgl.config import ServerConfig
from minisgl.kernels.op import all_ops

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "profiles/README.md",
    ROOT / "benchmarks/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
documents = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


@documents
def test_linked_files_exist(document):
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert missing == []


@documents
def test_modules_to_run_exist(document):
    modules = set(
        re.findall(
            r"python3? -m ((?:minisgl|benchmarks|profiles|tools)[\w.]*)", document.read_text()
        )
    )
    assert [name for name in sorted(modules) if find_spec(name) is None] == []


@documents
def test_flags_of_the_server_exist(document):
    known = {"--help", "--version"}
    for item in fields(ServerConfig):
        known |= {"--" + item.name.replace("_", "-"), *item.metadata["aliases"]}
    commands = re.findall(r'(?:minisgl\.serve|SERVE_ARGS=")(.*)', document.read_text())
    used = {flag for command in commands for flag in re.findall(r"--[a-z][\w-]*", command)}
    assert used - known == set()


@documents
def test_python_shown_is_python_and_imports_what_there_is(document):
    for block in re.findall(r"```python\n(.*?)```", document.read_text(), re.S):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "minisgl":
                assert {alias.name for alias in node.names} <= set(minisgl.__all__)


def test_files_and_functions_of_the_architecture_exist():
    text = (ROOT / "docs/ARCHITECTURE.md").read_text()
    files = re.findall(r"`(\w+/[\w/]+\.py)`", text)  # those in a folder of minisgl/ or in tests/
    there = [(ROOT / name).exists() or (ROOT / "minisgl" / name).exists() for name in files]
    assert [name for name, exists in zip(files, there, strict=True) if not exists] == []
    named = re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", text)
    assert len(named) >= 30
    for file, cell in named:
        tree = ast.walk(ast.parse((ROOT / "minisgl" / file).read_text()))
        defined = {node.name for node in tree if hasattr(node, "name")}
        for name in re.findall(r"`([\w.]+)`", cell):
            assert set(name.split(".")) <= defined, (file, name)


def gpu_kernels() -> list[tuple[str, str]]:
    """(op, implementation) of every kernel of our own for CUDA devices."""
    return [
        (op.name, implementation.name)
        for op in all_ops()
        for implementation in op.implementations
        if implementation.device == "cuda" and not implementation.path.endswith("_reference")
    ]


def compiled_for(op: str, implementation: str) -> list[int]:
    """Architectures of the compile gate's baseline, whose keys are "kernel label sm_90"."""
    baseline = json.loads((ROOT / "tests/compile/triton-3.6.0.json").read_text())
    kernels = kernels_of(op, implementation)
    found = {key.rsplit("sm_")[1] for key in baseline if key.split()[0] in kernels}
    return sorted(map(int, found))


def kernels_of(op: str, implementation: str) -> set[str]:
    """Names of the kernels in the file of an implementation."""
    (card,) = (card for card in all_ops() if card.name == op)
    (path,) = (i.path for i in card.implementations if i.name == implementation)
    module = import_module(path.split(":")[0])
    return {
        name
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and value.module == module.__name__
    }


def test_the_evidence_of_every_gpu_kernel_is_stated():
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \| [^|]+ \| ([^|]+) \| [^|]+ \| [^|]+ \|$",
        (ROOT / "docs/GPU_EVIDENCE.md").read_text(),
        re.M,
    )
    stated = {
        (op, name): [int(arch) for arch in re.findall(r"\d+", cell)] for op, name, cell in rows
    }
    assert [kernel for kernel in gpu_kernels() if kernel not in stated] == []
    for kernel, archs in stated.items():
        assert set(archs) <= set(compiled_for(*kernel)), kernel


def test_what_goals_predict_is_stated_beside_the_evidence():
    text = (ROOT / "docs/GPU_EVIDENCE.md").read_text()
    cells = {
        (op, name): cell
        for op, name, cell in re.findall(
            r"^\| `(\w+)` \| `(\w+)` \| [^|]+ \| [^|]+ \| ([^|]+) \|", text, re.M
        )
    }
    predicted = [goal for goal in goals("H100") if goal.predicted is not None]
    assert len(predicted) >= 10
    for goal in predicted:
        name = "hopper" if "Gluon" in goal.name else "portable"
        assert prediction(goal.predicted) in cells[goal.op, name], goal.name


def test_every_kernel_is_explained_with_the_figures_of_the_baseline():
    text = (ROOT / "docs/KERNELS.md").read_text()
    sections = re.findall(r"^### `(\w+)`$", text, re.M)
    assert sorted(sections) == sorted({op for op, _ in gpu_kernels()})
    baseline = json.loads((ROOT / "tests/compile/triton-3.6.0.json").read_text())
    table = text.split("## What the compiler makes of it")[1]
    rows = re.findall(r"^\| ([^|]+) \| `(\w+)` \| (.*) \|$", table, re.M)
    explained = set()
    for launch, kernel, cells in rows:
        for arch, cell in zip((80, 89, 90, 100), cells.split(" | "), strict=True):
            known = baseline.get(f"{kernel} {launch} sm_{arch}")
            figures = f"{known['registers']}, {known['shared']}" if known else ""
            assert cell.strip() == figures, (launch, kernel, arch)
        explained.add(kernel)
    unexplained = {kernel for kernel in gpu_kernels() if not kernels_of(*kernel) & explained}
    assert unexplained == set()
