"""POST /profile/start and /profile/stop: what they take and refuse, and with a real server."""

import gzip
import json
from pathlib import Path

import httpx
import pytest

from tests.server.served import PATIENCE, Served


@pytest.fixture
def post(server):
    def run(path: str, **options) -> tuple[int, dict]:
        answer = httpx.post(f"{server.url}/profile/{path}", **options)
        return answer.status_code, answer.json()

    return run


def test_bodies_reach_the_engine(post, engine):
    started = (200, {"directory": "/profiles/1"})
    assert post("start") == started
    assert post("start", json={}) == started
    assert post("start", json={"num_steps": 7, "traces": False}) == started
    assert post("stop") == (200, {"files": ["/profiles/1/timeline.json"]})
    assert engine.profiles == [(None, True), (None, True), (7, False), None]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("start", {"steps": 3}, "steps"),
        ("start", {"num_steps": "3"}, "num_steps"),
        ("start", {"traces": 1}, "traces"),
        ("stop", {"num_steps": 3}, "num_steps"),
        ("stop", [], None),
    ],
)
def test_a_wrong_body_is_refused_by_field(post, engine, path, body, param):
    status, answer = post(path, json=body)
    assert status == 400
    assert answer["error"]["param"] == param
    assert engine.profiles == []


def test_what_the_engine_refuses_is_400_and_a_dead_engine_503(post, engine):
    engine.refusal = "profile_dir is not set: start the engine with --profile-dir"
    for path in ("start", "stop"):
        status, answer = post(path)
        assert (status, answer["error"]["param"]) == (400, "profile_dir")
        assert answer["error"]["message"] == engine.refusal
    engine.refusal, engine.dead = None, "the engine process ended"
    status, answer = post("start")
    assert (status, answer["error"]["message"]) == (503, engine.dead)


def test_get_starts_nothing(server, engine):
    assert httpx.get(f"{server.url}/profile/start").status_code == 405
    assert engine.profiles == []


def test_a_served_model_is_profiled_while_it_answers(tmp_path):
    server = Served(f"--profile-dir={tmp_path}")
    try:
        url = server.wait_ready()

        def post(path: str, **body) -> httpx.Response:
            return httpx.post(f"{url}{path}", json=body, timeout=PATIENCE)

        def complete() -> None:
            answer = post("/v1/completions", prompt=[7, 8, 9], max_tokens=8, ignore_eos=True)
            assert answer.json()["usage"]["completion_tokens"] == 8

        complete()
        assert list(tmp_path.iterdir()) == []
        refused = post("/profile/stop")
        assert refused.status_code == 400
        assert "no profile is running" in refused.json()["error"]["message"]
        directory = Path(post("/profile/start").json()["directory"])
        assert directory.parent == tmp_path
        assert post("/profile/start").status_code == 400
        complete()
        files = post("/profile/stop").json()["files"]
        assert [Path(file).name for file in files] == ["timeline.json", "rank0.trace.json.gz"]
        assert all(Path(file).parent == directory for file in files)
        assert httpx.get(f"{url}/health").status_code == 200
        complete()
    finally:
        server.close()
    timeline = json.loads((directory / "timeline.json").read_text())["traceEvents"]
    assert sum(event["name"] == "forward" for event in timeline) == 8
    trace = json.loads(gzip.decompress((directory / "rank0.trace.json.gz").read_bytes()))
    names = [e["name"] for e in trace["traceEvents"] if e.get("cat") == "user_annotation"]
    assert names.count("forward") == names.count("prepare_inputs") == 8
    assert {"layer 0", "qkv_prepare", "decode", "linear"} <= set(names)
