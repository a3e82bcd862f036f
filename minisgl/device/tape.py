"""Graphs of a CPU: what a function does to static buffers, recorded once and replayed as a tape.

The first replay runs the function and records it: native ops by themselves (`csrc/cpu/tape.h`),
with the addresses and sizes that they were given; copies of dense memory as such; other operators
of PyTorch as calls that end in the same memory. A later replay makes these calls, and but for the
last ones without Python. What it allocates lies in an arena that all tapes of a device share, for
they run one after another; like a CUDA graph's pool it is reused within a tape as soon as nothing
refers to it.

A function that decides by the values of its tensors cannot be recorded call by call: `by_call` has
a tape call the whole of it again.
"""

import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import cache, partial, wraps
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from minisgl import csrc
from minisgl.log import get_logger
from minisgl.trace import detailed

log = get_logger(__name__)

_named = cache(partial(log.info, "recorded steps call %s, which is not native for their tensors"))

P = ParamSpec("P")
R = TypeVar("R")

ALIGNMENT = 64  # bytes
BLOCK_BYTES = 64 * 2**20  # of an arena's first block; what is not touched takes no memory

aten = torch.ops.aten
COPY, CONSTANT = aten.copy_.default, aten.lift_fresh.default
EMPTY = (aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.new_empty_strided)
READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# What reads values and is no operator.
READS = ("tolist", "numpy", "__array__", "__dlpack__", "__bool__", "is_nonzero")

_recording: ContextVar["_Recording | None"] = ContextVar("recording", default=None)
_calls: ContextVar[set[str] | None] = ContextVar("calls", default=None)


ALL = 2**20  # threads that no op asks for


class Arena:
    """Memory for what tapes allocate. A piece is free again when no tensor refers to it."""

    def __init__(self) -> None:
        self._blocks: list[tuple[int, np.ndarray]] = []  # and the addresses where they begin
        self._free: list[tuple[int, int]] = []  # addresses, from byte to byte
        # Free too, but not in the list yet: a tensor may end in any thread and at any point.
        self._returned: deque[tuple[int, int]] = deque()
        self._pieces: dict[int, weakref.ref[np.ndarray]] = {}  # told when one ends; by address
        self.num_tapes = 0  # recorded so far
        self.threads = ALL  # of a replay, at most

    @property
    def num_bytes(self) -> int:
        """Of all blocks, in use or not."""
        return sum(block.nbytes for _, block in self._blocks)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A dense tensor, its content any."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if not num_bytes:
            return torch.empty(shape, dtype=dtype)
        while self._returned:
            self._take_back(*self._returned.popleft())
        size = -(-num_bytes // ALIGNMENT) * ALIGNMENT
        place = next((i for i, (a, b) in enumerate(self._free) if b - a >= size), None)
        if place is None:
            place = len(self._free)
            self._free.append(self._grow(size))
        start, stop = self._free[place]
        if stop - start > size:
            self._free[place] = start + size, stop
        else:
            del self._free[place]
        memory = self._at(start, num_bytes)
        assert memory is not None
        returned = self._returned
        self._pieces[start] = weakref.ref(memory, lambda _: returned.append((start, start + size)))
        return torch.frombuffer(memory, dtype=dtype).view(shape)

    def alias(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same memory without keeping it: what a recorded call refers to is free to reuse."""
        storage = tensor.untyped_storage()
        memory = self._at(storage.data_ptr(), storage.nbytes())
        if memory is None:
            return tensor
        dense = torch.from_numpy(memory).view(tensor.dtype)
        return dense.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _grow(self, least: int) -> tuple[int, int]:
        """A new block's addresses. Each is twice as large as all before: were it as large as a
        tensor that grows from tape to tape, every one of them would leave a block behind."""
        size = max(least, BLOCK_BYTES, 2 * self.num_bytes)
        block = np.zeros(size + ALIGNMENT, np.uint8)
        block = block[-block.ctypes.data % ALIGNMENT :][:size]
        start = block.ctypes.data
        self._blocks.append((start, block))
        return start, start + size

    def _at(self, address: int, size: int) -> np.ndarray | None:
        """These bytes; None where they are not of the arena."""
        for start, block in self._blocks:
            if 0 <= address - start < len(block):
                return block[address - start : address - start + size]
        return None

    def _take_back(self, start: int, stop: int) -> None:
        free = []
        for a, b in self._free:
            if b == start:
                start = a
            elif a == stop:
                stop = b
            else:
                free.append((a, b))
        self._free = [*free, (start, stop)]


class TapeGraph:
    """What `function` does to static buffers. Used by one thread."""

    def __init__(self, function: Callable[[], object], arena: Arena) -> None:
        self._function = function
        self._arena = arena
        self._tape: tuple[Any, list[torch.Tensor]] | None = None  # native, and what it refers to
        self.calls: frozenset[str] = frozenset()  # through Python in a replay, by name

    def replay(self, *_: object) -> None:
        """Until the native module is built, and while details are traced, runs the function; also
        while another tape is recorded, of which this then becomes a part."""
        if detailed() or _recording.get() is not None:
            self._function()
        elif self._tape is not None:
            self._tape[0].replay(self._arena.threads)
        elif csrc.load("model_ops") is None:
            self._function()
        else:
            self._tape, self.calls = _record(self._function, self._arena)
            self._arena.num_tapes += 1


def recording() -> bool:
    """Whether what this thread calls goes on a tape."""
    return _recording.get() is not None


def empty(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """`torch.empty` for what native ops write; while a tape is recorded, of its arena, without
    PyTorch's dispatch, which takes ten times as long."""
    now = _recording.get()
    if now is None:
        return torch.empty(shape, dtype=dtype)
    with torch._C._DisableTorchDispatch():
        return now.arena.empty(shape, dtype)


def by_call(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates what a tape calls as a whole: what reads its tensors' values on the host, or has no
    native form.

    The log names it when it first goes on a tape, like operators of PyTorch that do: it then has
    Python run in every such step.
    """

    name = f"{function.__module__}.{function.__qualname__}"

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        recording = _recording.get()
        if recording is None:
            if (calls := _calls.get()) is not None:
                calls.add(name)
            return function(*args, **kwargs)
        with recording.paused():
            context = copy_context()
            result = function(*args, **kwargs)
            again = partial(context.run, function)
            return recording.note(name, again, args, kwargs, result)  # type: ignore[no-any-return]

    return call


@contextmanager
def calls_noted() -> Iterator[set[str]]:
    """Yields a set to which, within the context, `by_call` adds the name of what is called."""
    names: set[str] = set()
    token = _calls.set(names)
    try:
        yield names
    finally:
        _calls.reset(token)


def _record(
    function: Callable[[], object], arena: Arena
) -> tuple[tuple[Any, list[torch.Tensor]], frozenset[str]]:
    """Run `function`; its tape with what that refers to, and the names of what it calls through
    Python."""
    modules = [module for name in ("model_ops", "rank_ops") if (module := csrc.loaded(name))]
    tape = modules[0].Tape()
    recording = _Recording(tape, arena, modules)
    token = _recording.set(recording)
    try:
        with _NoReads(recording), recording, recording.natively():
            function()
    finally:
        _recording.reset(token)
    return (tape, recording.kept), frozenset(recording.calls)


class _Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds what PyTorch is asked for to a tape."""

    def __init__(self, tape: Any, arena: Arena, modules: Sequence[ModuleType]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_paused = False
        self._tape = tape
        self.arena = arena
        self._modules = modules
        self.calls: set[str] = set()
        self.kept: list[torch.Tensor] = []  # whose addresses copies have: not of the arena

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else PyTorch loads its compiler for the first operator

    @contextmanager
    def natively(self) -> Iterator[None]:
        """Within the context, native ops add themselves."""
        try:
            for module in self._modules:
                module.record(self._tape.address)
            yield
        finally:
            for module in self._modules:
                module.record(0)

    @contextmanager
    def paused(self) -> Iterator[None]:
        token, self.is_paused = _recording.set(None), True
        for module in self._modules:
            module.record(0)
        try:
            yield
        finally:
            for module in self._modules:
                module.record(self._tape.address)
            self.is_paused = False
            _recording.reset(token)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if self.is_paused:
            return func(*args, **(kwargs or {}))
        if _reads(func, args):
            raise RuntimeError(f"{func} reads a value while a tape is recorded")
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in EMPTY and result.is_contiguous():
            return self.arena.empty(result.shape, result.dtype)
        if func is COPY and _same_layout(*args[:2]):
            self._tape.copy(args[0].data_ptr(), args[1].data_ptr(), args[0].nbytes)
            self.kept += [tensor for tensor in args[:2] if self.arena.alias(tensor) is tensor]
            return result
        return self.note(func, func, args, kwargs or {}, result, func._schema.is_mutable)

    def note(
        self,
        name: object,
        function: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
        writes: bool = True,
    ) -> Any:
        """Have the tape call `function` again, unless it made a view. writes: to its arguments.

        Returns the result as the calls to come are to see it: where later calls will put theirs.
        """
        is_constant = function is CONSTANT  # it ends with the function: it is copied
        own = _storage(result)
        if not (own is None or writes or is_constant) and own in map(_storage, args[:1]):
            return result  # a view, as most are
        known = {_storage(tensor) for tensor in _tensors((args, kwargs))}
        if is_constant:
            known.clear()
        fresh: dict[int, torch.Tensor] = {}  # by the place in the result
        leaves = tree_leaves(result)
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, torch.Tensor) and _storage(leaf) not in known:
                fresh[i] = self.arena.empty(leaf.shape, leaf.dtype).copy_(leaf)
        if not (fresh or writes):
            return result
        _named(str(name))
        self.calls.add(str(name))
        alias = partial(tree_map_only, torch.Tensor, self.arena.alias)
        own_args, own_kwargs = alias(tuple(args)), alias(dict(kwargs))
        outputs = {i: self.arena.alias(tensor) for i, tensor in fresh.items()}

        def again() -> None:
            new = function(*own_args, **own_kwargs)
            new = [new] if isinstance(new, torch.Tensor) else tree_leaves(new)
            for i, output in outputs.items():
                output.copy_(new[i])

        self._tape.call(again if outputs else partial(function, *own_args, **own_kwargs))
        order = iter(range(len(leaves)))
        return tree_map_only(object, lambda leaf: fresh.get(next(order), leaf), result)


class _NoReads(TorchFunctionMode):
    """Refuses to read values while a tape is recorded: a replay would not read them again."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ in READS and not self._recording.is_paused:
            raise RuntimeError(f"{func.__name__} reads a value while a tape is recorded")
        return func(*args, **(kwargs or {}))


def _reads(func: Any, args: Sequence[Any]) -> bool:
    """Whether an operator's result, or its shape, depends on values that PyTorch reads for it."""
    if func.overloadpacket is aten.index:  # by numbers its shape is that of the indices
        return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))
    return not READING.isdisjoint(func.tags)


def _same_layout(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether copying is copying bytes."""
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.is_contiguous()
        and other.is_contiguous()
    )


def _storage(value: Any) -> int | None:
    """Where a tensor's memory begins."""
    return value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else None


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))
