"""A step of the scheduler: while it is planned, and until its results are back."""

from dataclasses import dataclass, field

from minisgl.core.batch import Batch, CascadeGroup, Chunk, RowSetup
from minisgl.core.costmodel import StepWork
from minisgl.core.kvcache import Commit
from minisgl.core.sequence import Sequence


@dataclass(slots=True)
class Plan:
    """The plan under way."""

    chunks: list[Chunk] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)
    groups: list[CascadeGroup] = field(default_factory=list)
    setups: list[RowSetup] = field(default_factory=list)
    num_tokens: int = 0
    num_pairs: int = 0  # of attention
    num_context: int = 0  # KV positions read
    num_sampled: int = 0
    short_of_pages: bool = False  # then nobody new is admitted


@dataclass(slots=True)
class PlannedStep:
    """A planned step: what `update` needs of it."""

    batch: Batch
    sequences: list[Sequence]  # aligned with batch.chunks
    commits: list[Commit]
    work: StepWork
