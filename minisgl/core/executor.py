"""The boundary between the engine, which decides, and the workers, which compute."""

from collections.abc import Collection
from typing import Protocol

import msgspec
import numpy as np

from minisgl.core.batch import Batch, StepOutput
from minisgl.core.request import SamplingParams


class Limits(msgspec.Struct, frozen=True):
    """What an executor can hold; the scheduler plans within it."""

    num_pages: int
    page_size: int  # tokens
    max_rows: int  # sequences running at once
    max_context: int  # tokens of prompt and output together
    vocab_size: int

    @property
    def pool_tokens(self) -> int:
        """Tokens that the KV pool holds."""
        return self.num_pages * self.page_size

    def check_token_ids(self, name: str, ids: Collection[int]) -> None:
        """Raises ValueError, beginning with `name`, when an id is outside the vocabulary."""
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = min(ids) if min(ids) < 0 else max(ids)
            raise ValueError(
                f"{name}: token ids must be at least 0 and below the vocabulary size "
                f"{self.vocab_size}, got {wrong}"
            )

    def check_length(self, num_prompt: int, prompt: str = "the prompt", at_least: str = "") -> None:
        """Raises ValueError where a sequence cannot hold a prompt of `num_prompt` tokens.

        In the words by which OpenAI's clients know it; `at_least` is put before a number that is
        only part of them, `prompt` is what the message calls it.
        """
        if num_prompt > self._capacity:
            raise ValueError(f"{self._most}. However, {prompt} has {at_least}{num_prompt} tokens")

    @property
    def _capacity(self) -> int:
        return min(self.max_context, self.pool_tokens)

    @property
    def _most(self) -> str:
        here = " here, as many as the KV pool holds" * (self.pool_tokens < self.max_context)
        return f"This model's maximum context length is {self._capacity} tokens{here}"

    def token_limit(
        self,
        num_prompt: int,
        params: SamplingParams,
        *,
        prompt: str = "the prompt",
        max_tokens: str = "max_tokens",
    ) -> int:
        """How many tokens a sequence with a prompt of `num_prompt` tokens may hold in all.

        Raises ValueError when that is less than it asks for, in the words of `check_length`;
        `prompt` and `max_tokens` are what the message calls the two. The last token is never read
        back, so it needs no room.
        """
        if not num_prompt:
            raise ValueError(f"{prompt} must have at least 1 token, got 0")
        self.check_length(num_prompt, prompt)
        capacity = self._capacity
        for name, count in ((max_tokens, params.max_tokens), ("min_tokens", params.min_tokens)):
            if num_prompt + (count or 1) - 1 > capacity:
                raise ValueError(
                    f"{self._most}. However, {prompt} has {num_prompt} tokens and {name} asks for "
                    f"{count}, the last of which needs no room: "
                    f"{num_prompt + (count or 1) - 1} together"
                )
        return num_prompt + (params.max_tokens or max(capacity - num_prompt, params.min_tokens, 1))


class Profiled(msgspec.Struct, frozen=True, array_like=True, tag="profiled"):
    """Answers a message that starts or stops a profile, from an engine or a rank.

    paths: the directory of the one that has started, or the files of the one that has stopped.
    refusal: why neither happened.
    """

    paths: list[str]
    refusal: str | None = None


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The last message of an engine or a rank that cannot go on."""

    reason: str


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

        Interrupts are let through while it waits; the step is then still the oldest.
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
