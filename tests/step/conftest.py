"""A tiny model, and executors of it that end with the test."""

import pytest

from minisgl.step.executor import LocalExecutor
from tests.world.tiny import make_executor, tiny_decoder


@pytest.fixture(scope="module")
def model():
    return tiny_decoder()


@pytest.fixture
def executors(model):
    """Makes an executor of the model, with the harness's facts."""
    made: list[LocalExecutor] = []

    def make(model=model, **facts):
        made.append(make_executor(model, **facts))
        return made[-1]

    yield make
    for executor in made:
        executor.close()
        executor.close()  # once more does nothing
