"""When forced tokens are worth a ragged step: by measured times alone."""

import math

from minisgl.core.forced_policy import RETRY, ForcedPolicy


def measured(slowdown: float, tokens: int, sequences: int = 1) -> ForcedPolicy:
    policy = ForcedPolicy()
    for _ in range(4):
        policy.observe(sequences, 0, 1e-3)
        policy.observe(sequences, tokens, slowdown * 1e-3)
    return policy


def test_a_step_with_them_must_bring_more_tokens_a_second():
    assert ForcedPolicy().pays(1, 1, math.inf, beside=False)  # to learn what it costs
    assert measured(1.1, 1).pays(1, 1, math.inf, beside=False)
    assert not measured(1.9, 1).pays(1, 1, math.inf, beside=False)
    assert measured(1.9, 2).pays(1, 2, math.inf, beside=False)
    assert not measured(5.0, 1).pays(1, 2, math.inf, beside=False)  # it costs no less than one did
    assert measured(1.9, 1).pays(2, 1, math.inf, beside=False)  # another load
    assert not measured(1.9, 2, sequences=64).pays(64, 2, math.inf, beside=True)


def test_neither_a_target_nor_those_beside_them_are_forgotten():
    assert measured(3.0, 60).pays(1, 60, math.inf, beside=False)
    assert not measured(3.0, 60).pays(1, 60, math.inf, beside=True)
    assert not measured(3.0, 60).pays(1, 60, 2e-3, beside=False)


def test_refusals_make_looks_rare_and_do_not_last_for_ever():
    policy, steps, refused = measured(9.0, 1), 0, 0
    while refused < RETRY:
        steps += 1
        if policy.looks():
            assert not policy.pays(1, 1, math.inf, beside=False)
            refused += 1
    assert steps > 32 * RETRY
    assert policy.pays(1, 1, math.inf, beside=False)
    assert policy.looks()


def test_what_was_not_measured_is_not_learnt():
    policy = ForcedPolicy()
    for _ in range(4):  # steps that recorded their graph
        policy.observe(1, 0, 0.0)
    for _ in range(2):
        policy.observe(1, 0, 1e-3)
        policy.observe(1, 4, 0.0)
        policy.observe(1, 4, 1.1e-3)
    assert policy.pays(1, 4, math.inf, beside=False)
