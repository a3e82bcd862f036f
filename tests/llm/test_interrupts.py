"""Ctrl-C at every moment of a call: the next one answers as if nothing had been.

An interrupt is planted at a line of the package, counted from the call's first, so that a moment
found bad is found again.
"""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

import minisgl
from minisgl import LLM, SamplingParams
from minisgl.core.request import Request
from minisgl.interrupts import held_back, let_through
from tests.world.books import check_books
from tests.world.engine import expected, make_engine, make_llm

PACKAGE = str(Path(minisgl.__file__).parent)
PROMPTS = [[1, 2, 3], list(range(60))]
PARAMS = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.0)


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    """Python's own, which is missing where a shell has started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def interrupt_at(moment: int | None) -> Iterator[list[int]]:
    """SIGINT at the package's `moment`-th line, then again three lines on; yields [lines run]."""
    lines = [0]

    def on_line(frame, event, argument):
        if event == "line":
            lines[0] += 1
            if moment is not None and lines[0] in (moment, moment + 3):
                signal.raise_signal(signal.SIGINT)
        return on_line

    def on_call(frame, event, argument):
        return on_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    sys.settrace(on_call)
    try:
        yield lines
    finally:
        sys.settrace(None)


def try_moments(llm: LLM, prompts: list[list[int]], answers: list[list[int]], count: int) -> int:
    """Interrupt `count` calls at random moments; returns how many were."""
    for _ in range(2):  # the second one finds its prompts cached, as all later ones do
        with interrupt_at(None) as lines:
            llm.generate(prompts, PARAMS, use_tqdm=False)
    generator, interrupted = Random(0), 0
    for _ in range(count):
        moment = generator.randrange(1, lines[0])
        try:
            with interrupt_at(moment):
                llm.generate(prompts, PARAMS, use_tqdm=False)
        except KeyboardInterrupt:
            interrupted += 1
        outputs = llm.generate(prompts, PARAMS, use_tqdm=False)
        assert [output.token_ids for output in outputs] == answers, moment
        stats = llm.stats().scheduler
        assert stats.num_running == stats.num_waiting == 0, moment
        assert stats.num_free_pages + stats.num_idle_pages == stats.num_pages, moment
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return interrupted


@pytest.mark.parametrize("overlap", [False, True])
def test_an_interrupt_at_any_moment_leaves_the_engine_as_good_as_new(overlap):
    engine = make_engine(overlap=overlap)
    answers = [expected(Request("a", prompt, PARAMS)) for prompt in PROMPTS]
    assert try_moments(make_llm(engine), PROMPTS, answers, 250) > 240
    check_books(engine.scheduler)


def test_an_interrupt_at_any_moment_of_a_real_model(model_directory):
    options = {"load_format": "dummy", "dtype": "float32", "device": "cpu"}
    with LLM(model_directory, max_total_tokens=512, log_level="warning", **options) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        answers = [output.token_ids for output in outputs]
        assert try_moments(llm, PROMPTS, answers, 60) > 50


def test_an_interrupt_is_held_back_until_the_block_ends_or_opens():
    said = []

    def interrupt(then: str) -> None:
        signal.raise_signal(signal.SIGINT)
        said.append(then)

    def hold_back() -> None:
        with held_back():
            interrupt("inside")
            with held_back():
                interrupt("further inside")

    def open_up() -> None:
        with let_through():
            interrupt("never")

    with pytest.raises(KeyboardInterrupt):
        hold_back()
    assert said == ["inside", "further inside"]
    with held_back():
        with pytest.raises(KeyboardInterrupt):
            open_up()
        interrupt("held back again")
        with pytest.raises(KeyboardInterrupt):
            open_up()
    assert said[2:] == ["held back again"]


def test_other_threads_and_absent_handlers_are_left_alone():
    def elsewhere() -> None:
        with held_back(), let_through():
            seen.append(signal.getsignal(signal.SIGINT))

    seen: list[object] = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        elsewhere()
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen[1] is signal.SIG_IGN
