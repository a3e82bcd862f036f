"""Comparing runs of tokens: native when it has been built, numpy otherwise, equal always."""

import numpy as np
import numpy.typing as npt

from minisgl import csrc

Tokens = npt.NDArray[np.int32]

FIRST_BLOCK = 64  # the twin compares blocks that double: an early difference ends it early


def common_prefix(a: Tokens, a_start: int, b: Tokens, b_start: int, limit: int) -> int:
    """How many tokens `a[a_start:]` and `b[b_start:]` share from their start, at most `limit`.

    a, b: contiguous int32 [n]. ValueError: a negative start or limit.
    """
    native = csrc.load("core_ops")
    if native is not None:
        return native.common_prefix(a, a_start, b, b_start, limit)  # type: ignore[no-any-return]
    return common_prefix_twin(a, a_start, b, b_start, limit)


def common_prefix_twin(a: Tokens, a_start: int, b: Tokens, b_start: int, limit: int) -> int:
    """The same in numpy."""
    if a_start < 0 or b_start < 0 or limit < 0:
        raise ValueError("a_start, b_start and limit must not be negative")
    end = min(limit, len(a) - a_start, len(b) - b_start)
    done, block = 0, FIRST_BLOCK
    while done < end:
        stop = min(end, done + block)
        differ = a[a_start + done : a_start + stop] != b[b_start + done : b_start + stop]
        first = int(differ.argmax())
        if differ[first]:
            return done + first
        done, block = stop, block * 2
    return done
