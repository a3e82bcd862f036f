"""What the engine's loop says of an engine that cannot be built, and in messages of what size."""

import pytest

from minisgl.core import scheduler
from minisgl.core.request import Request, SamplingParams
from minisgl.engine.engine import Engine
from minisgl.engine.loop import drive
from minisgl.engine.messages import Deltas, Drain, Failed, FromEngine, Submit, ToEngine
from tests.world.engine import make_engine


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
    assert sent == [Failed(f"{type(error).__name__}: {error}" if traced else str(error))]
    assert ("Traceback" in caplog.text) == traced


def test_log_probabilities_of_prompts_come_in_messages_of_bounded_size(monkeypatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_SCORED", 10)
    prompts = [[i % 90 for i in range(first, first + 200)] for first in range(3)]
    params = SamplingParams(prompt_logprobs=20, max_tokens=2)
    inbox: list[list[ToEngine]] = [
        [Submit(Request(str(i), prompt, params)) for i, prompt in enumerate(prompts)],
        [Drain(60)],
    ]
    sent: list[FromEngine] = []
    assert drive(make_engine, lambda timeout: inbox.pop(0) if inbox else [], sent.append)
    messages = [message.deltas for message in sent if isinstance(message, Deltas)]
    sizes = [sum(len(delta.prompt_logprobs or ()) for delta in deltas) for deltas in messages]
    assert max(sizes) == 10
    assert sum(sizes) == 3 * 199
    for i, prompt in enumerate(prompts):
        own = [delta for deltas in messages for delta in deltas if delta.request_id == str(i)]
        scored = [entry.token_id for delta in own for entry in delta.prompt_logprobs or ()]
        assert scored == prompt[1:]
