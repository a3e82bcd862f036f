"""How the parts of the Hopper kernel wait for one another, in every order that can happen.

No interpreter runs Gluon. So what each part does is said here step by step, as `hopper.py` and
`hopper_feed.py` have it, and all interleavings of a few tiles are gone through. In each of them
- a stage is filled only when no warp reads it, and read only when the tile meant has landed;
- queries are replaced only when no product reads them, and read only when all rows are there;
- warps of one consumer at most are in their turn;
- a barrier counts nobody twice in a phase, and nobody in another phase than the one meant;
- nobody waits for ever, and at the end the turn is consumer 0's.

Why it holds. Who waits for use u of a stage cannot miss it: the next use needs an arrival of both
consumers for this one. A second pass of the turn to a consumer comes after the other one's turn,
which it passed itself, so none is lost. Who has the turn waits in it for values n - 1 alone, whose
stage both consumers left after products of earlier turns. The last product of an item runs outside
turns and waits for its values alone.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pytest

STAGES = 2
Step = tuple[Any, ...]

# A rule that is left out -> items and warps with which that shows, and how.
UNSTORED = "queries are multiplied before all are stored"
FAULTS = {
    "nobody begins": ([3, 4], 1, "waits for ever"),
    "a stage is free after one consumer": ([3, 4], 1, "counted in phase"),
    "values are free before their product is done": ([3, 4], 1, "filled while it is read"),
    "one warp frees a stage for all": ([4], 2, "filled while it is read"),
    "one consumer leaves out a hidden tile": ([3, 4], 1, "reads 2 for k 4"),
    "phases begin anew with an item": ([3, 4], 1, "counted in phase"),
    "every item begins the turns": ([3, 4], 1, "waits for ever"),
}


def producer(items: Sequence[int], broken: str) -> Iterator[Step]:
    """items: tiles of keys of each; none where a last lap has no item for a program."""
    n = 0
    for tiles in items:
        if broken == "phases begin anew with an item":
            n = 0
        for _ in range(tiles):
            for kind in "kv":
                yield "wait", "empty", kind, n, 1 ^ (n // STAGES & 1)
                yield "request", kind, n
            n += 1


def consumer(me: int, items: Sequence[int], broken: str) -> Iterator[Step]:
    """Each of its warps; what one thread does for all of them stands in the others, too."""

    def full(kind: str, n: int) -> Step:
        return "wait", "full", kind, n, n // STAGES & 1

    def free(kind: str, n: int) -> Iterator[Step]:
        if broken != "one warp frees a stage for all":
            yield "meet", me
        yield "free", kind, n

    if me == 0 and broken != "nobody begins":
        yield "pass", 0
    first = 0
    for number, tiles in enumerate(items):
        if tiles == 0:
            continue
        if me == 0 and number and broken == "every item begins the turns":
            yield "pass", 0
        if broken == "phases begin anew with an item":
            first = 0
        yield "store", number
        if broken != UNSTORED:
            yield "meet", me
        hidden = broken == "one consumer leaves out a hidden tile" and me == 0 and tiles > 1
        last = first + tiles - 1 - hidden
        for n in range(first, last + 1):
            yield full("k", n)
            yield "turn", me
            yield "multiply", "k", n, number
            if n > first:
                yield full("v", n - 1)
                yield "multiply", "v", n - 1, number
            yield "pass", 1 - me
            yield "done", "k"
            yield from free("k", n)
            if n > first:
                early = broken == "values are free before their product is done"
                yield from free("v", n - 1) if early else ()
                yield "done", "v"
                yield from () if early else free("v", n - 1)
        yield full("v", last)
        yield "multiply", "v", last, number
        yield "done", "v"
        yield from free("v", last)
        first += tiles


class State(NamedTuple):
    at: tuple[int, ...]  # every process' next step: the producer, then the warps
    phases: frozenset[tuple[Step, tuple[int, int]]]  # of "full" and "empty": (ended, arrivals)
    held: frozenset[tuple[tuple[str, int], int]]  # (kind, stage) -> the tile that has landed there
    copies: frozenset[tuple[str, int]]  # (kind, tile) requested
    reads: frozenset[tuple[int, str, int]]  # (warp, kind, stage) of products on their way
    queries: tuple[int, ...]  # of which item each process' rows are
    met: frozenset[tuple[Step, int, str]]  # (named barrier, process, step) in its present phase
    parked: frozenset[int]  # processes that wait at a named barrier


class Fault(Exception):
    pass


class Kernel:
    """What can happen next in a state."""

    def __init__(self, items: Sequence[int], warps: int, broken: str, turns: bool) -> None:
        self.warps = warps
        self.owner = [-1, *[0] * warps, *[1] * warps]
        programs = [producer(items, broken)]
        programs += [consumer(owner, items, broken) for owner in self.owner[1:]]
        left_out = () if turns else ("turn", "pass")
        self.programs = [tuple(s for s in one if s[0] not in left_out) for one in programs]
        self.needed = {"full": 1, "empty": 1 if broken.startswith("a stage is free") else 2}
        self.in_turn = [self._turns(program) for program in self.programs]
        none: frozenset[Any] = frozenset()
        count = len(self.programs)
        self.start = State((0,) * count, none, none, none, none, (-1,) * count, none, none)

    def _turns(self, program: Sequence[Step]) -> list[bool]:
        """Whether one is between its turn and passing it, before each step and at the end."""
        inside = [False]
        for name, *_ in program:
            inside.append(name == "turn" or (inside[-1] and name != "pass"))
        return inside

    def arrive(self, state: State, name: str, kind: str, n: int) -> State:
        barrier, phases = (name, kind, n % STAGES), dict(state.phases)
        ended, arrivals = phases.get(barrier, (0, 0))
        if ended != n // STAGES:
            raise Fault(f"{name} {kind} of tile {n} counted in phase {ended}")
        whole = arrivals + 1 == self.needed[name]
        phases[barrier] = (ended + 1, 0) if whole else (ended, arrivals + 1)
        return state._replace(phases=frozenset(phases.items()))

    def land(self, state: State, kind: str, n: int) -> State:
        held = dict(state.held) | {(kind, n % STAGES): n}
        state = state._replace(held=frozenset(held.items()), copies=state.copies - {(kind, n)})
        return self.arrive(state, "full", kind, n)

    def step(self, state: State, who: int) -> State | None:
        """None: it has to wait."""
        name, *facts = self.programs[who][state.at[who]]
        at = (*state.at[:who], state.at[who] + 1, *state.at[who + 1 :])
        after, owner = state._replace(at=at), self.owner[who]
        if name == "wait":
            barrier, kind, n, parity = facts
            ended, _ = dict(state.phases).get((barrier, kind, n % STAGES), (0, 0))
            return None if ended & 1 == parity else after
        if name == "request":
            kind, n = facts
            if any(read[1:] == (kind, n % STAGES) for read in state.reads):
                raise Fault(f"stage of {kind} {n} filled while it is read")
            held = {key: tile for key, tile in state.held if key != (kind, n % STAGES)}
            return after._replace(held=frozenset(held.items()), copies=state.copies | {(kind, n)})
        if name == "store":
            if any(self.owner[warp] == owner and kind == "k" for warp, kind, _ in state.reads):
                raise Fault("queries replaced while they are read")
            queries = (*state.queries[:who], facts[0], *state.queries[who + 1 :])
            return after._replace(queries=queries)
        if name == "multiply":
            kind, n, item = facts
            if (found := dict(state.held).get((kind, n % STAGES))) != n:
                raise Fault(f"process {who} reads {found} for {kind} {n}")
            rows = {q for q, other in zip(state.queries, self.owner, strict=True) if other == owner}
            if kind == "k" and rows != {item}:
                raise Fault("queries of another item")
            return after._replace(reads=state.reads | {(who, kind, n % STAGES)})
        if name == "done":
            reads = (read for read in state.reads if read[:2] != (who, facts[0]))
            return after._replace(reads=frozenset(reads))
        if name == "free":
            first = self.owner.index(owner)
            return self.arrive(after, "empty", *facts) if who == first else after
        return self.come(after, who, name, facts[0])

    def come(self, state: State, who: int, name: str, to: int) -> State:
        """To a named barrier: that where a consumer's warps meet, or that of its turn."""
        barrier = ("meet", to) if name == "meet" else ("turn", to)
        if (barrier, who, name) in state.met:
            raise Fault(f"process {who} comes twice to {barrier}")
        met = state.met | {(barrier, who, name)}
        parked = state.parked if name == "pass" else state.parked | {who}
        here = {one for one in met if one[0] == barrier}
        if len(here) == self.warps * (1 if name == "meet" else 2):
            met, parked = met - here, parked - {one[1] for one in here if one[2] != "pass"}
        return state._replace(met=met, parked=parked)

    def following(self, state: State) -> Iterator[State]:
        for kind, n in sorted(state.copies):
            yield self.land(state, kind, n)
        for who, program in enumerate(self.programs):
            if who not in state.parked and state.at[who] < len(program):
                after = self.step(state, who)
                if after is not None:
                    yield after

    def check(self, state: State, ended: bool) -> None:
        free = (who for who in range(len(state.at)) if who not in state.parked)
        if {self.owner[who] for who in free if self.in_turn[who][state.at[who]]} == {0, 1}:
            raise Fault("both consumers are in their turn")
        if ended:
            if state.parked or any(
                at < len(program) for at, program in zip(state.at, self.programs, strict=True)
            ):
                raise Fault(f"somebody waits for ever: {state.at}")
            left = {(barrier, name) for barrier, _, name in state.met}
            assert left <= {(("turn", 0), "pass")}


def explore(items: Sequence[int], warps: int, broken: str = "", turns: bool = True) -> int:
    """The number of states that can come about. Raises Fault at one that must not."""
    kernel = Kernel(items, warps, broken, turns)
    seen, waiting = {kernel.start}, [kernel.start]
    while waiting:
        state = waiting.pop()
        following = [*kernel.following(state)]
        kernel.check(state, ended=not following)
        new = [after for after in dict.fromkeys(following) if after not in seen]
        seen.update(new)
        waiting += new
    return len(seen)


@pytest.mark.parametrize(
    ("items", "warps"),
    [([0], 1), ([5], 1), ([3, 1, 0, 2], 1), ([1, 1, 0], 2), ([3], 2)],
    ids=str,
)
def test_nothing_is_overwritten_and_nobody_waits_for_ever(items, warps):
    assert explore(items, warps) > 10 * sum(items)


@pytest.mark.parametrize("broken", FAULTS)
def test_each_rule_is_needed(broken):
    items, warps, seen = FAULTS[broken]
    with pytest.raises(Fault, match=seen):
        explore(items, warps, broken)


def test_turns_only_set_the_pace():
    """All else holds without them. With them a consumer's warps need not meet before they multiply
    queries, as they meet in its turn; they do, so that nothing rests on turns."""
    assert explore([1, 1], 2, turns=False) > 100
    assert explore([3, 2], 1, turns=False) > 100
    with pytest.raises(Fault, match="queries of another item"):
        explore([1], 2, UNSTORED, turns=False)
    assert explore([1], 2, UNSTORED) > 100
