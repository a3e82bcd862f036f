"""What the engine's loop says of an engine that cannot be built."""

import pytest

from minisgl.engine.engine import Engine
from minisgl.engine.loop import drive
from minisgl.engine.messages import Failed, FromEngine


@pytest.mark.parametrize(
    ("error", "traced"),
    [
        (ValueError("m.safetensors is no whole file"), False),
        (FileNotFoundError("config.json"), False),
        (RuntimeError("a fault of ours"), True),
    ],
)
def test_only_faults_of_the_engine_are_traced(
    error: Exception, traced: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def build() -> Engine:
        raise error

    sent: list[FromEngine] = []
    with caplog.at_level("INFO", logger="minisgl"):
        assert not drive(build, lambda timeout: [], sent.append)
    assert sent == [Failed(f"{type(error).__name__}: {error}")]
    assert ("Traceback" in caplog.text) == traced
