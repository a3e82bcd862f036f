"""The arithmetic of the decode benchmark. Its run is a stage of the check on GPU machines, too."""

import pytest

from benchmarks.decode import Figures, copy_rate
from benchmarks.intervals import idle_share
from benchmarks.steps import equal_share
from minisgl.device import CpuDevice


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
    assert equal_share(outputs, exact=False) == 0.75
    with pytest.raises(RuntimeError, match="differ between 'a' and 'c'"):
        equal_share(outputs, exact=True)
    with pytest.raises(ValueError, match="shorter"):
        equal_share({"a": want, "b": {"0": [1], "1": [3, 4]}}, exact=False)


def test_a_copy_rate_counts_bytes_read_and_written():
    device = CpuDevice(num_threads=1)
    assert copy_rate(device, 2**20, repeats=3) > 2**20
    device.close()
