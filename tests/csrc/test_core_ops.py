"""Token-run comparison: the native version, its numpy twin and plain Python agree."""

import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minisgl import csrc
from minisgl.core.tokens import common_prefix, common_prefix_twin

native = csrc.load("core_ops", wait=True)
IMPLEMENTATIONS = [
    pytest.param(common_prefix_twin, id="numpy"),
    pytest.param(common_prefix, id="chosen"),
    pytest.param(
        getattr(native, "common_prefix", None),
        id="native",
        marks=pytest.mark.skipif(native is None, reason="not built on this machine"),
    ),
]


def by_hand(a, a_start, b, b_start, limit):
    n = 0
    for x, y in zip(a[a_start:], b[b_start:], strict=False):
        if x != y or n == limit:
            break
        n += 1
    return n


@st.composite
def runs(draw):
    """Two arrays that share a run at random offsets; lengths around the comparison's blocks."""
    length = st.one_of(st.integers(0, 5), st.sampled_from([63, 64, 65, 127, 128, 129, 192, 300]))
    shared = np.full(draw(length), 7, np.int32)
    shared[::3] = draw(st.integers(-(2**31), 2**31 - 1))
    token = st.lists(st.integers(0, 2), max_size=4)
    heads = [draw(token), draw(token)]
    a, b = (np.array([*head, *shared, *draw(token)], np.int32) for head in heads)
    limit = draw(st.one_of(st.integers(0, 400), st.just(len(a))))
    return a, len(heads[0]), b, len(heads[1]), limit


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(runs())
def test_equal_to_plain_python(implementation, case):
    assert implementation(*case) == by_hand(*case)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_edges(implementation):
    a = np.arange(10, dtype=np.int32)
    assert implementation(a, 10, a, 10, 5) == 0  # at the end
    assert implementation(a, 12, a, 0, 5) == 0  # past the end
    assert implementation(a, 0, a, 0, 0) == 0
    assert implementation(a[2:], 0, a, 2, 100) == 8  # a view with an offset
    for case in [(a, -1, a, 0, 1), (a, 0, a, -1, 1), (a, 0, a, 0, -1)]:
        with pytest.raises(ValueError, match="must not be negative"):
            implementation(*case)


@pytest.mark.skipif(native is None, reason="not built on this machine")
def test_native_refuses_what_is_not_int32():
    good = np.arange(8, dtype=np.int32)
    for bad in (good.astype(np.int64), good.astype(np.float32), good[::2], good.reshape(2, 4)):
        with pytest.raises((TypeError, ValueError, BufferError)):
            native.common_prefix(good, 0, bad, 0, 4)
    with pytest.raises(TypeError):
        native.common_prefix(good, 0, [1, 2, 3], 0, 4)
    other = array.array("i", [0, 1, 2, 9])
    assert native.common_prefix(good, 0, other, 0, 4) == 3
    other.append(5)  # a BufferError if the view were still held
