"""One step's plan (`Batch`) and what came back (`StepOutput`), in plain integers.

A `Batch` can be logged, sent to other ranks as msgpack, and replayed; no floor above re-derives
any of it. Decode chunks come first, so that kernels and graphs see them as one slice.
"""

import msgspec

from minisgl.core.request import SamplingParams, TokenLogprobs

PENDING = -1  # a token that only the device knows; a start position likewise
MAX_CASCADE_GROUPS = 16  # of a batch: a captured launch covers this many, whatever there are


class Chunk(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What one sequence computes in one step: tokens [start, start + length).

    `token_ids` holds the ids, or is empty when the input is the row's last sampled id, which is
    still on the device, followed by `drafts`. `pages` replace the row's page-table entries from
    index `page_index` on (empty when nothing changed). `samples` is true when the chunk reaches
    the sequence's last token, so that its logits yield the next one; with k drafts the k + 1 last
    positions are verified; drafts of -1 are proposed on the device, by the draft model. Where
    earlier drafts are unread, `start` is the host's lower bound.
    """

    uid: int
    epoch: int
    row: int
    start: int
    length: int
    token_ids: list[int]
    page_index: int
    pages: list[int]
    samples: bool
    drafts: list[int] = []


class RowSetup(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A sequence takes a row: what the device must know of it until it leaves.

    `token_ids` are the tokens it holds at that moment (prompt, and after a preemption the output
    so far) where sampling or prompt logprobs need them, else empty.
    """

    uid: int
    epoch: int
    row: int
    choice: int
    prompt_length: int
    params: SamplingParams
    token_ids: list[int]
    banned_ids: list[int] = []  # what would end it, where `params.min_tokens` forbids that


class CopyJob(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Copy the first `num_tokens` slots of page `source` to page `target`, in every layer."""

    source: int
    target: int
    num_tokens: int


class CascadeGroup(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Decode chunks [first, first + count) of the batch share their first `num_pages` pages.

    All tokens of those pages are computed before this step, so every query of it sees them.
    """

    first: int
    count: int
    num_pages: int


class Batch(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """The plan of one step. Order on the device: setups, copies, writes of new KV, reads.

    `draft_chunks` are computed by the draft model alone, before it proposes: tokens of sequences
    that its own KV, on the same pages, lacks.
    """

    step: int
    chunks: list[Chunk]
    num_decode: int  # chunks[:num_decode] are decode chunks: one known or pending token + drafts
    setups: list[RowSetup] = []
    copies: list[CopyJob] = []
    cascade_groups: list[CascadeGroup] = []
    draft_chunks: list[Chunk] = []

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


class StepOutput(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """What a step produced, aligned with its batch's chunks.

    `token_ids[i]` are the tokens accepted for chunk i: empty when it does not sample, otherwise
    the matching drafts and the one token after them. `logprobs[i]` and `prompt_logprobs[i]` exist
    only for chunks that asked for them. `seconds` is the step's time on the device, 0 where it is
    no measure of others. `spans` exist while a profile runs: when the device began and ended the
    forward pass, then the sampling, in seconds of this machine's `time.perf_counter`.
    """

    step: int
    token_ids: list[list[int]]
    logprobs: dict[int, list[TokenLogprobs]] = {}
    prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
    seconds: float = 0.0
    spans: list[tuple[float, float]] = []
