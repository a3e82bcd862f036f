"""A step of the scheduler: while it is planned, and until its results are back."""

from minisgl.core.batch import Batch, CascadeGroup, Chunk, RowSetup
from minisgl.core.costmodel import StepWork
from minisgl.core.kvcache import Commit
from minisgl.core.sequence import Sequence


class Plan:
    """The plan under way."""

    __slots__ = (
        "chunks",
        "groups",
        "num_context",
        "num_pairs",
        "num_sampled",
        "num_tokens",
        "sequences",
        "setups",
        "short_of_pages",
    )

    def __init__(self) -> None:
        self.chunks: list[Chunk] = []
        self.sequences: list[Sequence] = []
        self.groups: list[CascadeGroup] = []
        self.setups: list[RowSetup] = []
        self.num_tokens = 0
        self.num_pairs = 0  # of attention
        self.num_context = 0  # KV positions read
        self.num_sampled = 0
        self.short_of_pages = False  # then nobody new is admitted


class PlannedStep:
    """A planned step: what `update` needs of it."""

    __slots__ = ("batch", "commits", "sequences", "work")

    def __init__(
        self, batch: Batch, sequences: list[Sequence], commits: list[Commit], work: StepWork
    ) -> None:
        self.batch = batch
        self.sequences = sequences  # aligned with batch.chunks
        self.commits = commits
        self.work = work
