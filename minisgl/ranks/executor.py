"""`ParallelExecutor`: the engine's `Executor` over all ranks, of which this process is rank 0."""

import contextlib
from collections.abc import Iterator

from minisgl.core.batch import Batch, StepOutput
from minisgl.core.executor import GrammarMasks
from minisgl.device import Device
from minisgl.models.loader import check_shares
from minisgl.ranks.channel import Dispatch, Sample, StartRankProfile, StopRankProfile
from minisgl.ranks.leader import Ranks
from minisgl.start.facts import Facts
from minisgl.start.load import load_worker
from minisgl.step.executor import LocalExecutor
from minisgl.step.worker import Worker


class ParallelExecutor(LocalExecutor):
    """The engine's `Executor` over all ranks: each call is also sent to the other ranks."""

    def __init__(self, worker: Worker, ranks: Ranks, *, trace_details: bool = False) -> None:
        super().__init__(worker, trace_details=trace_details)
        self._ranks = ranks
        self._broken = False

    def dispatch(self, batch: Batch) -> None:
        self._ranks.send(Dispatch(batch))
        super().dispatch(batch)

    def sample(self, step: int, masks: GrammarMasks | None = None) -> None:
        self._ranks.send(Sample(step))  # the masks stay here: only rank 0 draws
        super().sample(step, masks)

    def drafts(self, step: int) -> list[list[int]]:
        with self._explained():
            return super().drafts(step)

    def collect(self) -> StepOutput:
        with self._explained():
            output = super().collect()
            self._ranks.comm.check()
            return output

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Around waits for the device: replaces an error by the failure of another rank, if that is
        its cause."""
        try:
            yield
        except Exception as error:
            self._broken = True
            self._ranks.explain(error)

    def check(self) -> None:
        self._ranks.check()

    def start_profile(self, *, traces: bool) -> None:
        self._ranks.send(StartRankProfile(traces))
        super().start_profile(traces=traces)

    def stop_profile(self, directory: str) -> list[str]:
        self._ranks.send(StopRankProfile(directory))
        try:
            own = super().stop_profile(directory)
        finally:
            others = self._ranks.wait_profiled()
        return own + others

    def close(self) -> None:
        if self._broken:  # the others may wait for a step that will never come
            self._ranks.end()
        try:
            super().close()
        finally:
            self._ranks.close()


def load_ranks(facts: Facts, device: Device) -> ParallelExecutor:
    """Start all ranks and load the model into them; `device` is rank 0's.

    Raises ValueError naming a field that the model does not allow, RuntimeError when a rank fails.
    """
    config = facts.config
    check_shares(facts.model, config.tp_size)
    ranks = Ranks(config.tp_size)
    try:
        comm = ranks.start(config, facts.path, device)
        worker = load_worker(facts, device, comm)
        ranks.wait_ready()
    except BaseException as error:
        try:
            ranks.explain(error)
        finally:
            ranks.end()
            ranks.close()
    return ParallelExecutor(worker, ranks, trace_details=config.profile_dir is not None)
