"""Random traces against the hash-chain oracle: text, ends, log-probabilities and the page ledger.

A seeded plain driver for the bulk, hypothesis where a failure is to be made small.
"""

from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.world.trial import Trial, run_trial

TRIALS = 1000  # of a shard; every fault planted in test_faults.py is found within 700
FEW, MANY = range(2), range(2, 10)
SHARDS = [*FEW, *(pytest.param(shard, marks=pytest.mark.thorough) for shard in MANY)]


@pytest.mark.parametrize("shard", SHARDS)
def test_random_traces(shard):
    hits = preemptions = grouped = forced = 0
    for seed in range(shard * TRIALS, (shard + 1) * TRIALS):
        try:
            trial = run_trial(seed)
        except Exception as error:
            error.add_note(f"in the trace of seed {seed}")
            raise
        stats = trial.scheduler.stats()
        hits += stats.num_hit_tokens
        preemptions += stats.num_preemptions
        grouped += trial.executor.num_grouped
        forced += stats.num_forced_tokens
    # The traces are worth running only while they reach what they are about.
    assert hits > 5 * TRIALS
    assert preemptions > 0.1 * TRIALS
    assert grouped > TRIALS
    assert forced > TRIALS


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(st.randoms(use_true_random=False), st.integers(1, 5))
def test_traces_that_shrink(random: Random, num_requests: int):
    Trial(random).run(num_requests)
