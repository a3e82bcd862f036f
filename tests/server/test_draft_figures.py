"""What a server says of drafts: in the usage of a reply and in its metrics."""

import re
import time
import urllib.request

import pytest

from tests.server.served import PATIENCE, Served

FLAGS = ["--speculative-algorithm", "ngram", "--speculative-ngram-min", "1", "--dtype", "float32"]


@pytest.fixture(scope="module")
def served():
    server = Served(*FLAGS)
    yield server
    server.close()


def figure(served: Served, name: str) -> float:
    with urllib.request.urlopen(f"{served.wait_ready()}/metrics") as reply:
        return float(re.search(rf"^{name} (\S+)$", reply.read().decode(), re.M)[1])


def counted(served: Served) -> tuple[float, float]:
    """Drafts verified and accepted so far."""
    verified, accepted = "minisgl_draft_tokens_total", "minisgl_accepted_draft_tokens_total"
    return figure(served, verified), figure(served, accepted)


def test_usage_and_metrics_count_drafts(served):
    """Asked again, the answer lies in the cache, and is drafted from there when that pays."""
    accepted = rejected = calls = 0
    said = set()
    with served.client() as client:
        model = client.models.list().data[0].id
        while calls < 6 or (not accepted and calls < 60):
            stream = calls % 2 == 1
            answer = client.completions.create(
                model=model,
                prompt="Once upon a time",
                max_tokens=40,
                temperature=0,
                stream=stream,
                **({"stream_options": {"include_usage": True}} if stream else {}),
            )
            calls += 1
            parts = list(answer) if stream else [answer]
            said.add("".join(choice.text for part in parts for choice in part.choices))
            usage = parts[-1].usage
            assert usage.completion_tokens == 40
            if (details := usage.completion_tokens_details) is not None:
                assert details.accepted_prediction_tokens < usage.completion_tokens
                accepted += details.accepted_prediction_tokens
                rejected += details.rejected_prediction_tokens
    assert len(said) == 1
    assert accepted > 0
    expected = accepted + rejected, accepted
    end = time.monotonic() + PATIENCE  # the engine tells its figures as it becomes idle
    while counted(served) != expected and time.monotonic() < end:
        time.sleep(0.05)
    assert counted(served) == expected
    assert figure(served, "minisgl_draft_gain") > 0
