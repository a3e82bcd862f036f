"""What the documents say exists: linked files, flags, modules and the Python they show."""

import ast
import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest

import minisgl
from minisgl.config import ServerConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


@documents
def test_linked_files_exist(document):
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert missing == []


@documents
def test_modules_to_run_exist(document):
    modules = set(
        re.findall(r"python3? -m ((?:minisgl|benchmarks|tools)[\w.]*)", document.read_text())
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
