"""Shared by the tests of ranks."""

import socket

import pytest


@pytest.fixture
def address() -> str:
    """Of a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"
