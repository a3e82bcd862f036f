"""The boundary between the engine, which decides, and the workers, which compute."""

from typing import Protocol

import msgspec
import numpy as np

from minisgl.core.batch import Batch, StepOutput


class Limits(msgspec.Struct, frozen=True):
    """What an executor can hold; the scheduler plans within it."""

    num_pages: int
    page_size: int  # tokens
    max_rows: int  # sequences running at once
    max_context: int  # tokens of prompt and output together
    vocab_size: int


class GrammarMasks(msgspec.Struct, frozen=True):
    """Which tokens each constrained position of a step may take.

    `indices[i]` is the chunk in the batch, `bits[i]` its packed mask: uint32 words
    [ceil(vocab / 32)], bit set = allowed. A chunk with drafts has one entry per verified position,
    in order.
    """

    indices: list[int]
    bits: np.ndarray


class Executor(Protocol):
    """Runs batches in the order given. `dispatch` and `sample` return before the device is done."""

    @property
    def limits(self) -> Limits: ...

    @property
    def compilations(self) -> int:
        """Kernels that had to be compiled since it was ready: each one made requests wait."""

    def dispatch(self, batch: Batch) -> None:
        """Enqueue the forward pass of `batch`."""

    def drafts(self, step: int) -> list[list[int]]:
        """The drafts of every chunk of a dispatched step that has some of -1, as proposed.

        Waits for the draft model, not for the forward pass. RuntimeError when the step failed.
        """

    def sample(self, step: int, masks: GrammarMasks | None = None) -> None:
        """Enqueue the sampling of dispatched step `step`."""

    def collect(self) -> StepOutput:
        """Wait for the oldest sampled step and return its output.

        Raises RuntimeError when the step failed; the executor is then unusable.
        """

    def start_profile(self, *, traces: bool) -> None:
        """Fill `StepOutput.spans` from now on, and with `traces` record one on every rank.

        Nothing may be in flight.
        """

    def stop_profile(self, directory: str) -> list[str]:
        """End what `start_profile` began; returns the trace files written: one for each rank.

        Nothing may be in flight. Raises OSError when a file cannot be written.
        """

    def check(self) -> None:
        """Raises RuntimeError when nothing can run any more, though no step was asked for."""

    def close(self) -> None:
        """Release the device. Idempotent."""
