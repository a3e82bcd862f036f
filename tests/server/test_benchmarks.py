"""The load generator and the headline table count what they should, against a fake engine."""

import asyncio
import json
import random

import pytest

from benchmarks import headlines, serving


def run(server, *flags):
    fixed = ["--url", server.url, "--input-len", "3", "9", "--token-ids", "10", "300"]
    args = serving.parse([*fixed, *flags])
    return asyncio.run(serving.measure(args))


@pytest.mark.parametrize("load", [["--concurrency", "3"], ["--rate", "200"]])
@pytest.mark.parametrize("kind", [[], ["--text"]])
def test_every_token_is_counted(server, engine, load, kind):
    flags = ["--num-requests", "9", "--output-len", "4", "12"]
    figures = run(server, *flags, *load, *kind)
    assert len(engine.requests) == 1 + 9  # a warm-up comes first
    measured = engine.requests[1:]
    assert figures["requests"] == 9
    assert figures["failed"] == 0
    assert figures["output_tokens"] == sum(request.params.max_tokens for request in measured)
    assert figures["prompt_tokens"] == sum(len(r.prompt_token_ids) for r in measured)
    assert figures["within_slo"] == 1.0
    assert figures["ttft_ms"]["p50"] <= figures["ttft_ms"]["p99"] <= figures["latency_ms"]["p99"]
    assert all(request.params.ignore_eos for request in measured)


def test_the_clock_sees_the_servers_pace(server, engine):
    engine.delay = 0.02
    figures = run(server, "--num-requests", "4", "--output-len", "10", "10", "--slo-tpot-ms", "10")
    assert figures["itl_ms"]["p50"] >= 19
    assert figures["tpot_ms"]["p50"] >= 19
    assert figures["within_slo"] == 0.0
    assert figures["goodput_requests_per_second"] == 0.0
    assert figures["requests_per_second"] > 0


def test_a_closed_loop_keeps_so_many_busy_and_no_more(server, engine):
    engine.delay, most = 0.005, 0
    submit = engine.submit

    def watched(request):
        nonlocal most
        most = max(most, len(engine.running) + 1)
        return submit(request)

    engine.submit = watched
    try:
        run(server, "--num-requests", "12", "--concurrency", "3", "--output-len", "8", "8")
    finally:
        del engine.submit
    assert most == 3


def test_a_failing_server_is_no_result(server, engine):
    engine.refusal = "prompt has 9 tokens"
    with pytest.raises(SystemExit, match="warm-up request failed: 400"):
        run(server)


def test_tokens_that_were_not_asked_for_are_a_failure(server, engine):
    """A server that ends early would look fast."""
    ids = engine.ids
    engine.ids = lambda request: (ids(request)[0][:2], False)
    try:
        with pytest.raises(SystemExit, match="2 tokens came, 8 were asked for"):
            run(server, "--output-len", "8", "8")
    finally:
        del engine.ids


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([5], 0.99, 5), ([3, 1, 2, 4], 0.5, 2), (range(1, 101), 0.99, 99), (range(1, 102), 0.9, 91)],
)
def test_percentiles_are_values_that_occurred(values, share, expected):
    assert serving.percentile(list(values), share) == expected


def test_jobs_are_seeded_and_share_their_prefix():
    args = serving.parse(["--shared-prefix", "5", "--rate", "3", "--num-requests", "7"])
    jobs, again = serving.make_jobs(args), serving.make_jobs(args)
    assert jobs == again
    assert len({tuple(job.prompt[:5]) for job in jobs}) == 1
    assert [job.at for job in jobs] == sorted(job.at for job in jobs)


class FakeWorker:
    """Answers with a figure per measure, a little worse at every call."""

    figures: dict
    asked: list

    def __init__(self, config):
        self.facts = {"device": "test", "model": "m"}
        self._calls = 0

    def measure(self, name, seed, scale):
        self._calls += 1
        self.asked.append((name, seed, scale))
        unit, value = self.figures[name]
        return {unit: value}

    def close(self):
        pass


def test_a_headline_is_the_ratio_in_the_right_direction(monkeypatch, capsys):
    unit, other = "tokens_per_second", "ttft_ms"
    FakeWorker.figures = dict.fromkeys(headlines.MEASURES, (unit, 300.0))
    FakeWorker.figures |= {"static": (unit, 200.0), "static_padded": (unit, 100.0)}
    FakeWorker.figures |= {f"hit_{n}": (other, 2.0) for n in headlines.LENGTHS}
    FakeWorker.figures |= {f"miss_{n}": (other, 50.0) for n in headlines.LENGTHS}
    FakeWorker.asked = []
    monkeypatch.setattr(headlines, "Worker", FakeWorker)
    monkeypatch.setattr("sys.argv", ["headlines", "--rounds", "2"])
    headlines.main()
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])["rows"]
    ratios = [row["ratio"] for row in rows]
    assert ratios == [3.0, 1.5, *[25.0] * len(headlines.LENGTHS), 1.0, 1.0, 1.0]
    assert all(f"{row['ratio']:.2f}x" in out for row in rows)
    # A small round that is not measured, then two; both sides alike.
    sizes = (headlines.WARM_UP, 1.0, 1.0)
    assert FakeWorker.asked[:6] == [
        (name, number, sizes[number])
        for number in range(3)
        for name in ("continuous", "static_padded")
    ]


def test_work_is_the_same_for_both_sides():
    class Bench:
        scale = 1.0

        def prompt(self, generator, length):
            return [generator.randrange(9) for _ in range(length)]

    first, second = (headlines.long_tailed(Bench(), random.Random(3)) for _ in range(2))
    assert first == second
    tiny = Bench()
    tiny.scale = 0.001
    assert len(headlines.long_tailed(tiny, random.Random(3))) == 1
    lengths = sorted(length for _, length in first)
    assert lengths[-1] > 4 * lengths[len(lengths) // 2]  # a long tail
