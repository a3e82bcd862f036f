"""The all-reduce benchmark: a wrong sum is not timed. Its run is a stage of the GPU check, too."""

import pytest
import torch

from benchmarks import all_reduce
from minisgl.kernels.all_reduce import all_reduce_reference


def test_a_wrong_sum_is_refused():
    parts = all_reduce.make_parts(3, 5, 64, torch.bfloat16)
    total = all_reduce_reference(parts)
    all_reduce.check("ours", total, parts, exact=True)
    near = torch.nextafter(total, torch.full_like(total, torch.inf))
    all_reduce.check("another order", near, parts, exact=False)
    with pytest.raises(RuntimeError, match="ours gives a wrong sum"):
        all_reduce.check("ours", near, parts, exact=True)
    total[3, 7] += 1.0
    with pytest.raises(RuntimeError, match="another order gives a wrong sum"):
        all_reduce.check("another order", total, parts, exact=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--device cpu --ranks 1", "--ranks must be at least 2"),
        ("--device cpu --dtype float16", "must be bfloat16 or float32"),
    ],
)
def test_bad_words_are_named(words, message, capsys):
    with pytest.raises(SystemExit):
        all_reduce.parse(words.split())
    assert message in capsys.readouterr().err
