"""Whether steps of one size are faster on one core than on all of them, learnt while serving.

On all of a CPU's cores a step takes time from the planner of the next one, and the threads that
share its short ops wait for each other; on one core it computes longer. Which weighs more depends
on machine, model and size, so both are tried in turns, and periods of steps tell: replays by
themselves do not.
"""

from statistics import median

BLOCK = 8  # steps in a row with the same number of threads
TRIALS = 4  # blocks with each number
AGAIN = 512  # blocks from one trial to the next
SHORT = 1e-3  # seconds; of longer steps a planner takes little, and a trial would cost much
BETTER = 0.97  # of the periods on all cores, or it is noise


class Pace:
    """Of the steps of one size."""

    def __init__(self) -> None:
        self._steps = 0
        self._periods: dict[bool, list[float]] = {False: [], True: []}  # by whether on one core
        self._on_one = False

    def on_one(self, period: float | None) -> bool:
        """Whether the step that begins is to have one core. `period`: seconds since the one before
        it began, if that was of this size too, and nothing else came between."""
        is_trial = self._steps // BLOCK % AGAIN < 2 * TRIALS
        if period is not None and is_trial:
            self._periods[self._on_one].append(period)
        self._steps += 1
        if self._steps % BLOCK == 0:
            self._change(self._steps // BLOCK % AGAIN)
        return self._on_one

    def _change(self, block: int) -> None:
        """The number of cores for the block that begins."""
        on_all, on_one = self._periods[False], self._periods[True]
        if block < 2 * TRIALS:
            if block == 0:
                on_all.clear()
                on_one.clear()
            is_short = bool(on_all) and median(on_all) < SHORT
            self._on_one = is_short and not self._on_one
        elif block == 2 * TRIALS:
            self._on_one = bool(on_one) and median(on_one) < BETTER * median(on_all)
