"""The loop, against an executor whose tokens are known without it."""

import random
import time
from concurrent.futures import Future

import numpy as np
import pytest
from msgspec.structs import replace

from minisgl.core.request import Delta, Request, SamplingParams
from tests.world.books import check_books
from tests.world.engine import LIMITS, expected, make_engine
from tests.world.grammars import PlainBackend, PlainGrammar
from tests.world.hash_executor import EOS, HashExecutor

VOCAB = LIMITS.vocab_size


def make_requests(count: int, *, seed: int = 0, n: int = 1) -> list[Request]:
    """Random prompts, some sharing a prefix, some long enough to be chunked."""
    generator = random.Random(seed)
    shared = [generator.randrange(VOCAB) for _ in range(40)]
    requests = []
    for index in range(count):
        own = [generator.randrange(VOCAB) for _ in range(generator.randint(1, 70))]
        prompt = shared[: generator.choice([0, 0, 17, 40])] + own
        params = SamplingParams(
            max_tokens=generator.randint(1, 40),
            temperature=generator.choice([0.0, 1.0]),
            ignore_eos=generator.random() < 0.5,
            stop_token_ids=(5,),
            seed=generator.getrandbits(64),
            n=n,
        )
        requests.append(Request(f"r{index}", prompt, params))
    return requests


def run(engine, limit: int = 100_000) -> list[Delta]:
    deltas = []
    for _ in range(limit):
        if not engine.has_work():
            return deltas
        deltas += engine.step()
    raise AssertionError("the engine never came to rest")


def gather(deltas: list[Delta]) -> dict[tuple[str, int], list[int]]:
    tokens: dict[tuple[str, int], list[int]] = {}
    ended = set()
    for delta in deltas:
        key = (delta.request_id, delta.choice)
        assert key not in ended, f"{key} had news after its end"
        tokens.setdefault(key, []).extend(delta.token_ids)
        if delta.finish_reason is not None:
            ended.add(key)
    assert ended == set(tokens)
    return tokens


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("pages", [1000, 12])  # 12 pages of 16: preemptions happen
def test_tokens_are_the_models_own_in_any_batch(overlap, page_size, pages):
    pool = replace(LIMITS, page_size=page_size, num_pages=pages * 16 // page_size)
    engine = make_engine(overlap=overlap, limits=pool)
    requests = make_requests(30, n=2)
    for request in requests:
        engine.add(request)
    tokens = gather(run(engine))
    for request in requests:
        for choice in range(2):
            assert tokens[request.id, choice] == expected(request, choice)
    engine.executor.compilations = 3
    stats = engine.stats()
    assert stats.compilations == 3
    assert stats.output_tokens == sum(map(len, tokens.values()))
    assert stats.scheduler.num_hit_tokens > 0
    assert (stats.scheduler.num_preemptions > 0) == (pages == 12)
    assert stats.longest_step > 0


def test_overlap_keeps_one_step_in_flight_and_its_absence_none():
    for overlap, most in ((False, 1), (True, 2)):
        engine = make_engine(overlap=overlap)
        engine.add(Request("a", [1, 2, 3], SamplingParams(max_tokens=9, ignore_eos=True)))
        run(engine)
        assert engine.executor.most_in_flight == most


def test_an_empty_plan_with_a_step_in_flight_collects():
    engine = make_engine(overlap=True)
    engine.add(Request("a", [1, 2, 3], SamplingParams(max_tokens=1)))
    assert engine.step() == []
    assert engine.executor.calls == ["dispatch 0", "sample 0"]
    (delta,) = engine.step()
    assert delta.finish_reason is not None
    assert engine.executor.calls == ["dispatch 0", "sample 0", "collect 0"]
    assert not engine.has_work()
    assert engine.step() == []


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("seed", range(25))
def test_an_abort_at_any_moment_ends_that_choice_only(overlap, seed):
    generator = random.Random(seed)
    engine = make_engine(overlap=overlap, limits=replace(LIMITS, num_pages=30))
    requests = make_requests(10, seed=seed, n=2)
    plan = sorted((generator.randrange(60), generator.randrange(20)) for _ in range(8))
    deltas, aborted = [], {}
    for request in requests:
        engine.add(request)
    for step in range(10_000):
        while plan and plan[0][0] <= step:
            which = plan.pop(0)[1]
            request, choice = requests[which // 2], generator.choice([which % 2, None])
            engine.abort(request.id, choice)
            for each in range(2) if choice is None else [choice]:
                aborted.setdefault((request.id, each), step)
        if not plan and not engine.has_work():
            break
        deltas += engine.step()
    tokens = gather(deltas)
    for request in requests:
        for choice in range(2):
            want, got = expected(request, choice), tokens.get((request.id, choice), [])
            assert got == want[: len(got)]
            assert (request.id, choice) in aborted or got == want
    assert engine.stats().scheduler.num_running == 0
    assert engine.stats().scheduler.num_waiting == 0


def test_an_abort_of_the_unknown_is_ignored():
    engine = make_engine()
    engine.abort("nobody")
    engine.abort("nobody", 3)
    assert run(engine) == []


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], SamplingParams(), ["prompt"]),
        ([1] * 300, SamplingParams(), ["300", "256"]),
        ([1] * 200, SamplingParams(max_tokens=100), ["256"]),
        ([VOCAB], SamplingParams(), [str(VOCAB)]),
    ],
)
def test_what_can_never_be_served_is_refused_with_its_numbers(prompt, params, words):
    engine = make_engine()
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (the words are checked below)
        engine.add(Request("a", prompt, params))
    assert all(word in str(caught.value) for word in words), caught.value
    assert not engine.has_work()


def test_an_omitted_max_tokens_runs_to_the_context():
    engine = make_engine()
    request = Request("a", [1, 2, 3], SamplingParams(ignore_eos=True))
    engine.add(request)
    deltas = run(engine)
    assert gather(deltas)["a", 0] == expected(request)
    assert deltas[-1].finish_reason == "length"


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failed_step_ends_everything_with_the_reason(overlap):
    engine = make_engine(overlap=overlap, fail_at=3)
    for name in "abc":
        engine.add(Request(name, [1, 2, 3], SamplingParams(max_tokens=50, ignore_eos=True)))
    deltas = run(engine)
    gather(deltas)
    ends = [delta for delta in deltas if delta.finish_reason is not None]
    assert sorted(delta.request_id for delta in ends) == ["a", "b", "c"]
    assert all(delta.finish_reason == "error" for delta in ends)
    assert all("planted fault" in delta.error for delta in ends)
    assert "planted fault" in engine.failure
    with pytest.raises(RuntimeError, match="planted fault"):
        engine.add(Request("d", [1], SamplingParams()))
    assert engine.step() == []


def test_close_closes_the_executor():
    engine = make_engine()
    engine.close()
    assert engine.executor.closed


class Digits(PlainGrammar):
    """A grammar over token ids: each token is the one before plus 1 or 2, starting from 0."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.last, self.fails_at = 0, fails_at

    def accept(self, token_id: int) -> str | None:
        if token_id - self.last not in (1, 2):
            return f"{token_id} does not follow {self.last}"
        self.last = token_id
        return None

    def fill_mask(self, bits: np.ndarray) -> str | None:
        for token in (self.last + 1, self.last + 2):
            bits[token // 32] |= np.uint32(1 << (token % 32))
        failed = self.fails_at is not None and self.last >= self.fails_at
        return "planted: too complex" if failed else None


class DigitsBackend(PlainBackend):
    """Compiles "digits"; "digits 40", which fails from 40 on; "late", when it is told to."""

    timeout = 0.2

    def __init__(self) -> None:
        self.late: Future[Digits] = Future()

    def compile(self, spec: str) -> Future[Digits]:
        return self.late if "late" in spec else super().compile(spec)

    def begin(self, text: str) -> Digits:
        if text == "broken":
            raise RuntimeError("planted: a bug of the backend")
        if not text.startswith("digits"):
            raise ValueError(f"grammar must be 'digits', got {text!r}")
        return Digits(int(text.split()[1]) if " " in text else None)


def digits(grammar: str = "digits", **params) -> SamplingParams:
    """Sampled by a grammar, whose tokens end nothing."""
    chosen = {"max_tokens": 30, "temperature": 1.0, "seed": 4} | params
    return SamplingParams(structured_outputs={"grammar": grammar}, **chosen)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_grammar_constrains_its_sequences_and_no_other(overlap):
    engine = make_engine(
        overlap=overlap, grammar_backend=DigitsBackend(), limits=replace(LIMITS, num_pages=30)
    )
    engine.add(Request("grammar", [1, 2, 3], digits(n=3)))
    free = make_requests(8)
    for request in free:
        engine.add(request)
    tokens = gather(run(engine))
    for request in free:
        assert tokens[request.id, 0] == expected(request)
    runs = [tokens["grammar", choice] for choice in range(3)]
    for ids in runs:
        assert len(ids) == 30
        assert set(np.diff([0, *ids])) == {1, 2}
    assert runs[0] != runs[1]


@pytest.mark.parametrize("overlap", [False, True])
def test_an_interrupted_wait_changes_no_token(overlap):
    """With a grammar, a step is dispatched and not yet sampled when the wait is cut off."""
    engine = make_engine(overlap=overlap, grammar_backend=DigitsBackend())
    generator = random.Random(0)

    def wait() -> None:
        if generator.random() < 0.4:
            raise KeyboardInterrupt

    def run_interrupted() -> dict[tuple[str, int], list[int]]:
        deltas, interrupts = [], 0
        while engine.has_work():
            try:
                deltas += engine.step()
            except KeyboardInterrupt:
                interrupts += 1
        assert interrupts > 10
        return gather(deltas)

    undisturbed = make_engine(grammar_backend=DigitsBackend())
    free = make_requests(8)
    for request in [Request("grammar", [1, 2, 3], digits()), *free]:
        engine.add(request)
        undisturbed.add(request)
    engine.executor.wait = wait
    assert run_interrupted() == gather(run(undisturbed))
    check_books(engine.scheduler)


def test_under_overlap_masks_are_filled_while_the_forward_runs():
    engine = make_engine(overlap=True, grammar_backend=DigitsBackend())
    engine.add(Request("a", [1, 2, 3], digits(max_tokens=3)))
    run(engine)
    calls = engine.executor.calls
    assert calls[:5] == ["dispatch 0", "sample 0", "dispatch 1", "collect 0", "sample 1"]


def test_without_a_backend_structured_outputs_are_refused():
    with pytest.raises(ValueError, match="structured_outputs is not supported"):
        make_engine().add(Request("a", [1], digits()))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("grammar", "says", "emitted"),
    [
        ("letters", "got 'letters'", 0),
        ("broken", "RuntimeError: planted: a bug of the backend", 0),
        ("digits 25", "planted: too complex", 13),
    ],
)
def test_a_grammar_that_fails_ends_its_request_alone(overlap, grammar, says, emitted):
    engine = make_engine(overlap=overlap, grammar_backend=DigitsBackend())
    free = make_requests(6)
    for request in [Request("bad", [1, 2], digits(grammar, n=2)), Request("good", [7], digits())]:
        engine.add(request)
    for request in free:
        engine.add(request)
    deltas = run(engine)
    tokens = gather(deltas)
    assert all(tokens[request.id, 0] == expected(request) for request in free)
    assert len(tokens["good", 0]) == 30
    ends = [d for d in deltas if d.request_id == "bad" and d.finish_reason]
    assert [(d.finish_reason, d.refused) for d in ends] == [("error", True)] * 2
    assert all(says in d.error for d in ends)
    for choice in range(2):
        assert len(tokens["bad", choice]) >= emitted
        assert set(np.diff([0, *tokens["bad", choice]])) <= {1, 2}
    check_books(engine.scheduler)
    assert engine.failure is None


def test_a_compilation_delays_nobody_and_is_refused_when_it_takes_too_long():
    engine = make_engine(grammar_backend=DigitsBackend())
    started = time.monotonic()
    engine.add(Request("late", [1], digits("late", n=2)))
    free = make_requests(4)
    for request in free:
        engine.add(request)
    tokens = gather(run(engine))
    assert all(tokens[request.id, 0] == expected(request) for request in free)
    assert tokens["late", 0] == tokens["late", 1] == []
    assert 0.2 <= time.monotonic() - started < 5


def test_a_request_is_admitted_when_its_grammar_is_compiled():
    engine = make_engine(grammar_backend=(backend := DigitsBackend()))
    engine.add(Request("late", [1, 2, 3], digits("late", n=3)))
    with pytest.raises(ValueError, match="'late' is in use"):
        engine.add(Request("late", [1], SamplingParams()))
    assert engine.step() == []
    engine.abort("late", 1)
    compiled = Digits()
    compiled.warnings = ["#/not: not is not supported"]
    backend.late.set_result(compiled)
    deltas = run(engine)
    assert [d.warnings for d in deltas if d.warnings] == [["#/not: not is not supported"]]
    tokens = gather(deltas)
    assert tokens["late", 1] == []
    undisturbed = make_engine(grammar_backend=DigitsBackend())
    undisturbed.add(Request("late", [1, 2, 3], digits(n=3)))
    same = gather(run(undisturbed))
    assert [tokens["late", c] for c in (0, 2)] == [same["late", c] for c in (0, 2)]


def test_what_is_aborted_while_it_compiles_never_runs():
    engine = make_engine(grammar_backend=(backend := DigitsBackend()))
    engine.add(Request("late", [1, 2, 3], digits("late", n=2)))
    engine.abort("late")
    assert {d.finish_reason for d in run(engine)} == {"abort"}
    assert backend.late.cancelled()
    assert not engine.has_work()
    engine.close()
    assert backend.closed


def test_what_another_request_waits_for_is_compiled_all_the_same():
    engine = make_engine(grammar_backend=(backend := DigitsBackend()))
    for name in "abc":
        engine.add(Request(name, [1, 2, 3], digits("late")))
    engine.abort("a")
    engine.abort("b")
    assert not backend.late.cancelled()
    backend.late.set_result(Digits())
    assert len(gather(run(engine))["c", 0]) == 30


def test_what_is_joined_may_take_as_long_as_the_last_one_waits():
    engine = make_engine(grammar_backend=(backend := DigitsBackend()))
    engine.add(Request("first", [1], digits("late")))
    time.sleep(0.15)
    engine.add(Request("second", [1], digits("late")))
    time.sleep(0.1)
    (refused,) = engine.step()
    assert (refused.request_id, refused.refused) == ("first", True)
    assert not backend.late.cancelled()
    backend.late.set_result(Digits())
    assert len(gather(run(engine))["second", 0]) == 30


def test_a_state_that_cannot_be_copied_ends_its_request_alone():
    class Uncopied(Digits):
        def copy(self, end=None):
            raise RuntimeError("planted: no copy")

    class Backend(DigitsBackend):
        def begin(self, text):
            return Uncopied() if text == "uncopied" else super().begin(text)

    engine = make_engine(grammar_backend=Backend())
    engine.add(Request("bad", [1, 2], digits("uncopied", n=2)))
    engine.add(Request("good", [7], digits()))
    deltas = run(engine)
    ends = [d for d in deltas if d.request_id == "bad"]
    assert [(d.finish_reason, d.refused) for d in ends] == [("error", True)] * 2
    assert all("RuntimeError: planted: no copy" in d.error for d in ends)
    assert len(gather(deltas)["good", 0]) == 30
    check_books(engine.scheduler)


def test_an_end_by_the_requests_own_tokenizer_needs_a_grammar_that_may_end():
    class Ending(Digits):
        ends: tuple[int, ...] = ()

        def copy(self, end=None):
            made = super().copy()
            made.ends = () if end is None else (end,)
            return made

        def accept(self, token_id):
            return "the text ends before it may" if token_id in self.ends else None

    class Backend(DigitsBackend):
        def begin(self, text):
            return Ending()

        def fill_masks(self, wanted, bits):
            return {}

    engine = make_engine(grammar_backend=Backend())
    free = make_engine(grammar_backend=Backend())
    free.add(Request("a", [1, 2, 3], digits()))
    third = gather(run(free))["a", 0][2]
    engine.add(Request("a", [1, 2, 3], digits(), eos_token_id=third))
    (end,) = [d for d in run(engine) if d.finish_reason]
    assert (end.finish_reason, end.refused) == ("error", True)
    assert "the text ends before it may" in end.error


def test_an_end_that_the_grammar_refuses_is_an_error_and_no_stop():
    """An end by a token of the user's own; the backend's mask lets everything pass."""

    class Careless(DigitsBackend):
        def fill_masks(self, wanted, bits):
            return {}

    engine = make_engine(grammar_backend=Careless())
    stops = tuple(range(5, VOCAB))
    engine.add(Request("a", [1, 2, 3], digits(stop_token_ids=stops)))
    (end,) = [d for d in run(engine) if d.finish_reason]
    assert end.finish_reason == "error"
    assert "does not follow" in end.error


def test_an_end_of_sequence_ends():
    """The oracle itself: without it the tests above could not tell a lost end."""
    ends = [expected(r) for r in make_requests(200) if not r.params.ignore_eos]
    assert any(tokens[-1] == EOS for tokens in ends)
    assert isinstance(make_engine().executor, HashExecutor)
