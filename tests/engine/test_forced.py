"""Tokens that a grammar leaves no choice about: the same with steps of their own and without."""

from typing import Any

import numpy as np
import pytest

from minisgl.core.request import Delta, Request, SamplingParams
from minisgl.engine.engine import Engine
from tests.world.books import check_books
from tests.world.engine import LIMITS, make_engine
from tests.world.grammars import PlainBackend, PlainGrammar
from tests.world.hash_executor import allowed_at

VOCAB = LIMITS.vocab_size


def formed(**params: Any) -> SamplingParams:
    form = {"grammar": "any"}
    return SamplingParams(temperature=1.0, seed=4, structured_outputs=form, **params)


def run(engine: Engine) -> list[Delta]:
    deltas = []
    while engine.has_work():
        deltas += engine.step()
    return deltas


def gather(deltas: list[Delta]) -> dict[tuple[str, int], list[int]]:
    tokens: dict[tuple[str, int], list[int]] = {}
    for delta in deltas:
        tokens.setdefault((delta.request_id, delta.choice), []).extend(delta.token_ids)
    return tokens


class Places(PlainGrammar):
    """Allows what `allowed_at` does, place by place of the output: often a single token."""

    def __init__(self) -> None:
        self.place = 0

    def allowed(self) -> list[int]:
        return [token or 1 for token in allowed_at(7, self.place, VOCAB)]

    def accept(self, token_id: int) -> str | None:
        if token_id not in self.allowed():
            return f"{token_id} is not allowed at {self.place}"
        self.place += 1
        return None

    def fill_mask(self, bits: np.ndarray) -> str | None:
        for token in self.allowed():
            bits[token // 32] |= np.uint32(1 << (token % 32))
        return None


class PlacesBackend(PlainBackend):
    def begin(self, text: str) -> Places:
        return Places()


@pytest.mark.parametrize("overlap", [False, True])
def test_forced_tokens_change_no_token_and_no_end(overlap):
    """Requests that end at every place, by count and by a stop token, beside free ones."""
    said = {}
    for forces in (False, True):
        engine = make_engine(overlap=overlap, grammar_backend=PlacesBackend(), force_tokens=forces)
        for most in range(1, 25):
            stops = allowed_at(7, most, VOCAB)[:1] if most % 3 == 0 else ()
            params = formed(max_tokens=2 * most, stop_token_ids=stops, n=1 + most % 2)
            engine.add(Request(f"{most}", [1, 2, most], params))
            engine.add(Request(f"free {most}", [most] * 20, SamplingParams(max_tokens=most)))
        deltas, ends = run(engine), {}
        for delta in deltas:
            if delta.finish_reason is not None:
                ends[delta.request_id, delta.choice] = delta.finish_reason, delta.stop_token_id
        said[forces] = gather(deltas), ends
        assert bool(engine.stats().scheduler.num_forced_tokens) == forces
        check_books(engine.scheduler)
    assert said[False] == said[True]
    assert {reason for reason, _ in said[True][1].values()} == {"stop", "length"}


def test_forced_tokens_save_steps():
    steps = {}
    for forces in (False, True):
        engine = make_engine(grammar_backend=PlacesBackend(), force_tokens=forces)
        engine.add(Request("one", [1, 2, 3], formed(max_tokens=60)))
        deltas = run(engine)
        steps[forces] = engine.stats().steps
        assert sum(len(delta.token_ids) for delta in deltas) == 60
    saved = engine.stats().scheduler.num_forced_tokens
    assert saved > 10
    assert steps[False] - steps[True] == saved
