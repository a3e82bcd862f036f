"""`Sequence`: one choice of one request and how far it has come."""

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from minisgl.core.executor import Limits
from minisgl.core.pages import NO_PAGES, Pages
from minisgl.core.request import FinishReason, Request
from minisgl.core.tokens import Tokens


class Status(Enum):
    """A sequence moves WAITING -> RUNNING -> ENDED; a preempted one goes back to WAITING."""

    WAITING = auto()
    RUNNING = auto()
    PREEMPTED = auto()  # holds its row and pages until its steps in flight are back
    ENDED = auto()  # finished or aborted; the same holds


# Looking a member up in its Enum takes 0.1 us, and every step asks for each sequence's.
WAITING, RUNNING, PREEMPTED, ENDED = Status


@dataclass(slots=True)
class HeldPages:
    """The KV pages of a sequence. Written by `KVCache`, but for what is said of a field."""

    # Its first `count` entries are the pages; the rest is room to grow.
    buffer: Pages = field(default_factory=lambda: NO_PAGES)
    count: int = 0
    capacity: int = 0  # tokens they can hold
    num_patched: int = 0  # leading pages that the device's page table has; `patch` takes the rest
    num_drafted: int = 0  # tokens before it have KV of the draft model; `Speculation` counts on

    @property
    def pages(self) -> Pages:
        return self.buffer[: self.count]

    def extend(self, pages: Pages) -> None:
        """Add pages at the end, for which room is made ahead."""
        end = self.count + len(pages)
        if end > len(self.buffer):
            self.buffer = np.resize(self.buffer, end + end // 8 + 16)
        self.buffer[self.count : end] = pages
        self.count = end

    def patch(self, stop: int) -> list[int]:
        """Those of the first `stop` pages that the device's page table lacks.

        They go out with the step being planned.
        """
        pages = self.buffer[self.num_patched : stop].tolist()
        self.num_patched = stop
        return pages  # type: ignore[no-any-return]


@dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """Counts, not phases: tokens held, tokens computed, and the gap that steps close.

    Under overlap some results are unread. Counts are then the host's lower bounds: every sampling
    step in flight brings at least one token (`num_pending`), and up to `num_slack` more where its
    drafts are accepted. Where a grammar forces what is pending, it is held already (`foretold`).
    KV positions before `num_computed` are written once the steps in flight have run.
    """

    # What was asked. Never changes.
    uid: int  # order of arrival
    request: Request
    choice: int
    prompt: Tokens
    limit: int  # tokens it may hold in all
    stop_ids: frozenset[int]
    queued_at: float  # seconds, the scheduler's clock

    # Its place. Written by `Running`.
    status: Status = Status.WAITING
    epoch: int = 0  # how many times it has been preempted
    aged: bool = False  # has waited so long that it comes first, whatever its priority
    row: int = -1
    # Tokens whose ids the host sends: those held when it took its row, and a grammar's forced ones.
    # Other inputs are the device's own samples.
    num_fed: int = 0

    # Its tokens. Written by `accept`.
    output: list[int] = field(default_factory=list)
    num_tokens: int = 0  # held: prompt and output

    # How far it has come. Written by `Planner` when a step is planned, by `Scheduler` when it is
    # read; `KVCache.attach` sets what a cached prefix has computed.
    in_flight: int = 0  # steps planned and not read
    num_computed: int = 0
    num_pending: int = 0
    num_slack: int = 0
    foretold: list[int] = field(default_factory=list)  # held tokens that the step in flight samples
    num_cached: int = 0  # prompt tokens found in the cache when it first ran
    num_unscored: int = 0  # last prompt tokens whose log-probabilities are wanted, and not sent yet

    kv: HeldPages = field(default_factory=HeldPages)

    def accept(self, new: list[int]) -> tuple[list[int], FinishReason | None, int | None]:
        """Append sampled tokens up to the sequence's end.

        Returns those appended, why it ends with them (None: it goes on), and the token it
        stopped at.
        """
        for count, token in enumerate(new, 1):
            self.output.append(token)
            self.num_tokens += 1
            if token in self.stop_ids and len(self.output) >= self.request.params.min_tokens:
                return new[:count], "stop", token
            if self.num_tokens >= self.limit:
                return new[:count], "length", None
        return new, None, None

    def token_ids(self, start: int, stop: int) -> list[int]:
        """Held tokens [start, stop)."""
        prompt = self.request.prompt_token_ids
        if stop <= len(prompt):
            return prompt[start:stop]
        offset = len(prompt)
        return prompt[start:] + self.output[max(start - offset, 0) : stop - offset]

    def tokens(self, stop: int) -> Tokens:
        """Held tokens [0, stop) as int32 [stop]."""
        if stop <= len(self.prompt):
            return self.prompt[:stop]
        output = np.array(self.output[: stop - len(self.prompt)], np.int32)
        return np.concatenate((self.prompt, output))


def make_sequences(
    request: Request, limits: Limits, eos: frozenset[int], first_uid: int, now: float
) -> list[Sequence]:
    """The `params.n` sequences of a request.

    Raises ValueError when they could never run: an empty prompt, ids outside the vocabulary, or
    more tokens than the context or the KV pool hold.
    """
    params = request.params
    limit = limits.token_limit(len(request.prompt_token_ids), params)
    for name, ids in (
        ("prompt", request.prompt_token_ids),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", [token_id for token_id, _ in params.logit_bias]),
    ):
        limits.check_token_ids(name, ids)
    prompt = np.array(request.prompt_token_ids, np.int32)
    stop_ids = frozenset(params.stop_token_ids)
    if not params.ignore_eos:
        stop_ids |= eos
        stop_ids |= set() if request.eos_token_id is None else {request.eos_token_id}
    return [
        Sequence(
            first_uid + choice,
            request,
            choice,
            prompt,
            limit,
            stop_ids,
            now,
            num_tokens=len(prompt),
            num_unscored=0 if params.prompt_logprobs is None else len(prompt) - 1,
        )
        for choice in range(params.n)
    ]
