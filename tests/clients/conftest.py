"""Servers for clients whose environment is not the server's own, but lies within it."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.server.served import Served, calling_model

collect_ignore_glob = [] if find_spec("instructor") else ["test_*.py"]  # another environment

PYTHON = Path(sys.prefix).parent / "bin/python"
TEXT = "<think>Which?</think>Let me see."
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Köln {"}}\n</tool_call>'


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.clients)


@pytest.fixture(scope="session")
def url(tmp_path_factory):
    """Of the bundled model, which is held to what it is asked for."""
    folder = calling_model(tmp_path_factory.mktemp("model"))
    flags = f"--model={folder}", "--reasoning-parser=none", "--served-model-name=tiny"
    server = Served(*flags, python=PYTHON)
    yield f"{server.wait_ready()}/v1"
    server.close()


@pytest.fixture(scope="session")
def scripted_url():
    """Of a model that thinks, says something and calls a tool, each time."""
    server = Served(f"{TEXT}\n{CALL}", module="tests.server.scripted", python=PYTHON)
    yield f"{server.wait_ready()}/v1"
    server.close()
