"""What an engine reports of itself, and the messages that cross its process border (msgpack)."""

import msgspec

from minisgl.core.executor import Failed, Limits, Profiled
from minisgl.core.request import Delta, Request
from minisgl.core.stats import SchedulerStats


class EngineInfo(msgspec.Struct, frozen=True):
    """What is served; constant while the engine runs."""

    model: str  # as the user named it
    model_path: str  # the local directory that holds it, tokenizer included
    architecture: str
    dtype: str
    device: str
    eos_token_ids: list[int]
    limits: Limits
    sampling_defaults: dict[str, int | float] = {}  # where a request says nothing, by field


class EngineStats(msgspec.Struct, frozen=True):
    """Counters since the engine started."""

    steps: int  # collected
    tokens: int  # computed by those steps, prompts and recomputation included
    output_tokens: int  # emitted
    longest_step: float  # seconds
    scheduler: SchedulerStats
    compilations: int = 0  # kernels compiled since it was ready: each one made requests wait


class Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    request: Request


class Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    """End one choice of a request, or all of them when `choice` is None."""

    request_id: str
    choice: int | None


class Drain(msgspec.Struct, frozen=True, array_like=True, tag="drain"):
    """Take no new request, finish what runs within `timeout` seconds, then stop."""

    timeout: float


class StartProfile(msgspec.Struct, frozen=True, array_like=True, tag="start_profile"):
    """Profile the next `num_steps` steps, or until `StopProfile`. Answered by one `Profiled`."""

    num_steps: int | None
    traces: bool


class StopProfile(msgspec.Struct, frozen=True, array_like=True, tag="stop_profile"):
    """Answered by one `Profiled`; the answers come in the order of the questions."""


ToEngine = Submit | Abort | Drain | StartProfile | StopProfile


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """Loaded and warmed up. Always the first message of an engine that starts."""

    info: EngineInfo


class Deltas(msgspec.Struct, frozen=True, array_like=True, tag="deltas"):
    deltas: list[Delta]


class Rejected(msgspec.Struct, frozen=True, array_like=True, tag="rejected"):
    """The engine refuses a request; `reason` names the field, its limit and the value, or says why
    the engine has stopped, which refuses every request."""

    request_id: str
    reason: str
    stopped: bool = False


class Status(msgspec.Struct, frozen=True, array_like=True, tag="status"):
    """Sent by the loop itself when it becomes busy or idle, and regularly: it shows progress."""

    busy: bool
    stats: EngineStats


FromEngine = Ready | Deltas | Rejected | Status | Profiled | Failed
