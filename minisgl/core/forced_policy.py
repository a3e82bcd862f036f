"""When forced tokens pay: what a step with some costs, against one without, as measured.

They need no steps of their own, but the step that computes them is ragged, so no decode graph fits
it, and those beside them wait for it. Both kinds of steps are measured by the number of sequences,
and the one by its forced tokens too (powers of two).
"""

from collections import defaultdict

from minisgl.core.draft_policy import Average

WORTH = 1.25  # the gain asked for: planning and packing a ragged step are not in its time
MOST_SLOWDOWN = 2.0  # of those beside them, as while prompts are computed
MOST_PAUSE = 63  # steps without a look for forced tokens, while they do not pay
RETRY = 32  # refusals until all is tried again


class ForcedPolicy:
    """Forced tokens are taken where a step with them brings more tokens per second."""

    def __init__(self) -> None:
        self._plain: defaultdict[int, Average] = defaultdict(Average)  # seconds
        self._slowdown: defaultdict[tuple[int, int], Average] = defaultdict(Average)
        self._num_refused = 0
        self._pause = 0  # after the next refusal it is twice as long
        self._left = 0  # of the present one

    def looks(self) -> bool:
        """Whether to look for forced tokens now: that takes time too."""
        self._left -= 1
        return self._left < 0

    def pays(self, num_sequences: int, num_forced: int, limit: float, *, beside: bool) -> bool:
        """Whether `num_forced` tokens, steps that sequences save, are worth a ragged step.

        limit: seconds that a step may take; beside: whether others are in it. What has not been
        measured twice is tried, unless fewer tokens cost too much already.
        """
        size, gain = num_sequences.bit_length(), 1.0 + num_forced / num_sequences
        sizes = [(size, tokens) for tokens in range(num_forced.bit_length() + 1)]
        known = [self._slowdown[each] for each in sizes if each in self._slowdown]
        slowdown = max((each.value for each in known if each.count > 1), default=0.0)
        most = min(gain, MOST_SLOWDOWN) if beside else gain
        if WORTH * slowdown < most and slowdown * self._plain[size].value <= limit:
            self._pause = self._left = 0
            return True
        self._pause = self._left = min(2 * self._pause + 1, MOST_PAUSE)
        self._num_refused += 1
        if self._num_refused % RETRY == 0:
            self._slowdown.clear()
        return False

    def observe(self, num_sequences: int, num_forced: int, seconds: float) -> None:
        """A step in which so many sequences decoded, with neither prompts nor drafts.

        Times that are not positive are ignored.
        """
        if seconds <= 0.0:
            return
        size = num_sequences.bit_length()
        plain = self._plain[size]
        if not num_forced:
            plain.add(seconds)
        elif plain.count > 1:
            self._slowdown[size, num_forced.bit_length()].add(seconds / plain.value)
