"""One server with a fake engine for all tests of the HTTP layer; each test finds it fresh."""

import pytest


@pytest.fixture(scope="session")
def server_thread():
    from tests.server.fake_engine import ServerThread

    server = ServerThread()
    yield server
    server.close()


@pytest.fixture
def server(server_thread):
    server_thread.engine.reset()
    return server_thread


@pytest.fixture
def engine(server):
    return server.engine


@pytest.fixture
def client(server):
    from openai import OpenAI

    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client
