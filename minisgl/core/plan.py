"""`Plan`: one step of the scheduler, from its first chunk until its results are read."""

from dataclasses import dataclass, field

from minisgl.core.batch import Batch, CascadeGroup, Chunk, CopyJob, RowSetup
from minisgl.core.costmodel import Work
from minisgl.core.sequence import Sequence


@dataclass(slots=True)
class Plan:
    """What a step computes, and what `update` needs to know of it."""

    step: int
    chunks: list[Chunk] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)  # aligned with `chunks`
    num_decode: int = 0  # chunks[:num_decode] are decode chunks
    num_streams: int = 0  # chunks that are no prompts: those, and what grammars force behind them
    num_forced: int = 0  # tokens of those beyond one for each
    setups: list[RowSetup] = field(default_factory=list)
    copies: list[CopyJob] = field(default_factory=list)
    cascade_groups: list[CascadeGroup] = field(default_factory=list)
    draft_chunks: list[Chunk] = field(default_factory=list)
    work: Work = Work(0, 0, 0, 0)
    short_of_pages: bool = False  # then no new sequence is admitted

    def batch(self) -> Batch:
        return Batch(*(getattr(self, name) for name in Batch.__struct_fields__))
