"""Who may import whom beside the package: profiles use benchmarks, benchmarks use no profiles.

What several benchmarks share stands in files that nobody runs: a command is imported by no other
benchmark, so there is no circle to walk. The rules are also shown to catch what is planted.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.test_floors import imports

ROOT = Path(__file__).parents[2]


def modules(root: Path) -> dict[str, tuple[ast.Module, list[str]]]:
    """By dotted name: the syntax tree of every file, and what it imports, at its top or later."""
    found = {}
    for folder in ("benchmarks", "profiles"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = list(path.relative_to(root).with_suffix("").parts)
            is_package = parts[-1] == "__init__"
            name = parts[:-1] if is_package else parts
            tree = ast.parse(path.read_text())
            found[".".join(name)] = tree, [name for _, name in imports(tree, name, is_package)]
    return found


def runs(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)


def faults(root: Path) -> Iterator[str]:
    found = modules(root)
    graph: dict[str, set[str]] = {}
    for name, (_, imported) in found.items():
        # "from benchmarks.x import y" names benchmarks.x.y: the module is what of it there is.
        known = {part for each in imported for part in (each, each.rpartition(".")[0])}
        graph[name] = {other for other in known if other in found and other != name}
        if name.startswith("benchmarks"):
            for other in sorted(graph[name]):
                if other.startswith("profiles"):
                    yield f"{name} imports {other}: benchmarks use no profiles"
                elif runs(found[other][0]):
                    yield f"{name} imports {other}, a command: move what they share"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"a circle: {' -> '.join(error.args[1])}"


def test_benchmarks_and_profiles_import_one_way():
    assert list(faults(ROOT)) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"benchmarks/a.py": "from profiles import b", "profiles/b.py": ""},
            "benchmarks.a imports profiles.b: benchmarks use no profiles",
        ),
        (
            {
                "benchmarks/a.py": "def f():\n    from benchmarks.b import x",
                "benchmarks/b.py": "def main(): pass",
            },
            "benchmarks.a imports benchmarks.b, a command: move what they share",
        ),
        (
            {"benchmarks/a.py": "import benchmarks.b", "benchmarks/b.py": "import benchmarks.a"},
            "a circle: benchmarks.",
        ),
        (
            {"profiles/a.py": "from profiles.b import x", "profiles/b.py": "import profiles.a"},
            "a circle: profiles.",
        ),
    ],
)
def test_what_is_planted_is_caught(tmp_path, files, expected):
    for name, source in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    (found,) = faults(tmp_path)
    assert found.startswith(expected)
