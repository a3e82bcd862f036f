"""Tests reach no private name of minisgl's objects: they would hold the code to how it is written.

Found in the syntax trees of tests/: attributes of anything but `self`, imports, and names in the
words of `setattr` and its like. The rule is shown to catch what is planted in a copy.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BY_NAME = {"setattr", "getattr", "delattr", "hasattr", "object", "patch"}  # what takes a name
# Of what has no public counterpart yet; to become empty.
ALLOWED: dict[str, set[str]] = {}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def private_names(package: Path) -> set[str]:
    """Private functions, classes, attributes and variables that the package defines anywhere."""
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return set(filter(is_private, found))


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def reached(tree: ast.Module, private: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name) of the package's private names that a test's module reaches."""
    ours = set()  # what is imported from the package
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minisgl"):
            ours |= {alias.asname or alias.name for alias in node.names}
            yield from ((node.lineno, a.name) for a in node.names if is_private(a.name))
        elif isinstance(node, ast.Attribute) and node.attr in private and not is_self(node.value):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in BY_NAME:
            words = [x.value for x in node.args if isinstance(x, ast.Constant)]
            names = [str(word).rsplit(".", 1)[-1] for word in words]
            yield from ((node.lineno, name) for name in names if name in private)
    for node in ast.walk(tree):  # a subclass of the package's is one of its objects
        if isinstance(node, ast.ClassDef) and any(
            ast.unparse(base).split(".")[0] in ours for base in node.bases
        ):
            inside = [x for x in ast.walk(node) if isinstance(x, ast.Attribute)]
            yield from (
                (x.lineno, x.attr) for x in inside if x.attr in private and is_self(x.value)
            )


def faults(root: Path) -> Iterator[str]:
    private = private_names(root / "minisgl")
    for path in sorted((root / "tests").rglob("*.py")):
        name = path.relative_to(root).as_posix()
        for line, reach in reached(ast.parse(path.read_text()), private):
            if reach not in ALLOWED.get(name, ()):
                yield f"{name}:{line}: {reach} is private"


def test_tests_reach_no_private_names():
    found = list(faults(ROOT))
    assert not found, "\n" + "\n".join(found)


def test_nothing_is_allowed_that_need_not_be():
    private = private_names(ROOT / "minisgl")
    for name, allowed in ALLOWED.items():
        path = ROOT / name
        tree = ast.parse(path.read_text() if path.exists() else "")
        assert allowed <= {reach for _, reach in reached(tree, private)}, name


PACKAGE = "class A:\n    def __init__(self):\n        self._a = 1\n\ndef _f():\n    pass\n"


@pytest.mark.parametrize(
    ("source", "reach"),
    [
        ("def test(made):\n    assert made.part._a == 1", "_a"),
        ("from minisgl.x import _f", "_f"),
        ("from minisgl import x\nx._f()", "_f"),
        ("def test(monkeypatch, made):\n    monkeypatch.setattr(made, '_a', 2)", "_a"),
        ("with patch('minisgl.x._f'):\n    pass", "_f"),
        ("from minisgl.x import A\nclass B(A):\n    def f(self):\n        self._a = 2", "_a"),
        ("class B:\n    def f(self):\n        self._a = 2", None),
        ("import torch\ntorch._dynamo", None),
    ],
)
def test_a_planted_reach_is_caught(tmp_path, source, reach):
    for name, text in (("minisgl/x.py", PACKAGE), ("tests/test_x.py", source)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    found = list(faults(tmp_path))
    assert [text.split(": ")[1] for text in found] == ([f"{reach} is private"] if reach else [])
