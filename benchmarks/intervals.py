"""Intervals of time: their union, how much of it lies in a window, how much time is in none."""

from collections.abc import Iterable, Iterator

Interval = tuple[float, float]


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """The union as disjoint intervals in order."""
    union: list[Interval] = []
    for begin, end in sorted(intervals):
        if union and begin <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((begin, end))
    return union


def covered(union: Iterable[Interval], window: Interval) -> Iterator[float]:
    """Lengths of the parts of `union` inside `window`."""
    for begin, end in union:
        yield max(0.0, min(end, window[1]) - max(begin, window[0]))


def idle_share(intervals: Iterable[Interval]) -> float:
    """The share of the time from the first one's begin to the last one's end that none covers."""
    union = merge(intervals)
    window = union[0][0], union[-1][1]
    return 1 - sum(covered(union, window)) / (window[1] - window[0])
