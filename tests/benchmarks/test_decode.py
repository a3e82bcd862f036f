"""The decode benchmark runs at a tiny size, and its arithmetic is right. Figures are not judged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.decode import Figures, compare, copy_rate, idle_share
from minisgl.device import CpuDevice

ROOT = Path(__file__).parents[2]


def test_a_tiny_shape_is_measured_in_every_way():
    sizes = "--batch 1 5 --steps 4 --warmup 2 --rounds 1 --input-len 9 --check 6 --chunk 16"
    command = [sys.executable, "-m", "benchmarks.decode", "--shape", "tiny", "--device", "cpu"]
    command += [*sizes.split(), "--copy-mib", "1", "--dtype", "float32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    ways = ["as it is", "overlap off", "graphs off"]
    found = [(row["batch"], row["way"]) for row in result["rows"]]
    assert found == [(batch, way) for batch in (1, 5) for way in ways]
    for row in result["rows"]:
        assert row["equal"] == 1
        assert -1e-9 < row["idle"] < 1
        assert row["kernels_idle"] is None
        assert 0 < row["roofline"] < 1
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["step_ms"])
    assert result["compilations_after_ready"] == 0
    assert [row["way"] for row in result["mixed"]] == ["eager", "piecewise"]
    for row in result["mixed"]:
        assert (row["batch"], row["chunk"], row["equal"]) == (1, 16, 1)
        assert min(row["step_ms"], row["device_ms"], row["launch_ms"]) > 0
    assert result["mixed"][0]["ratio"] == 1


@pytest.mark.parametrize(
    ("spans", "share"),
    [
        ([(0, 1), (1, 2)], 0),
        ([(0, 1), (3, 4)], 0.5),
        ([(3, 4), (0, 1)], 0.5),
        ([(0, 4), (1, 2), (3, 5)], 0),
        ([(0, 2), (1, 2), (6, 8)], 0.5),
    ],
)
def test_idle_is_what_no_span_covers(spans, share):
    assert idle_share(spans) == pytest.approx(share)


def test_the_roofline_is_bytes_over_the_copy_rate():
    figures = Figures(4, "x", [0.2, 0.4, 0.3], [0.1], [0.01], [0.0], [60.0])
    row = figures.row(1000.0, None)
    assert row["roofline"] == pytest.approx(60 / 1000 / 0.3)
    assert row["tokens_per_s"] == pytest.approx(4 / 0.3)


def test_tokens_that_differ_are_told():
    want = {"0": [1, 2], "1": [3, 4]}
    outputs = {"a": want, "b": want, "c": {"0": [1, 2], "1": [3, 9]}}
    assert compare(outputs, exact=False) == 0.75
    with pytest.raises(RuntimeError, match="differ between 'a' and 'c'"):
        compare(outputs, exact=True)
    with pytest.raises(ValueError, match="shorter"):
        compare({"a": want, "b": {"0": [1], "1": [3, 4]}}, exact=False)


def test_a_copy_rate_counts_bytes_read_and_written():
    device = CpuDevice(num_threads=1)
    assert copy_rate(device, 2**20, repeats=3) > 2**20
    device.close()
