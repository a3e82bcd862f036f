"""The sampler's kernels against a slow oracle, and its statistics against exact distributions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisgl.core.batch import RowSetup
from minisgl.core.request import SamplingParams
from minisgl.device import CpuDevice
from minisgl.kernels.sampling import SEEN_IN_PROMPT, adjust_logits, make_params, mask_logits, sample
from minisgl.kernels.sampling.cpu import (
    adjust_logits_cpu,
    adjust_logits_twin,
    mask_logits_cpu,
    mask_logits_twin,
    sample_cpu,
    sample_twin,
)
from minisgl.kernels.sampling.noise import gumbel, hash_ids, position_keys, row_key
from minisgl.step.rows import HostRows, RowBuffers
from tests.world import sampling
from tests.world.levels import at, levels

VOCAB = 67
EOS = (2, 5)
INT = torch.int32


CPU = torch.device("cpu")
DRAWS = [pytest.param(sample.reference, id="reference"), pytest.param(sample_twin, id="twin")]
ADJUSTS = [adjust_logits.reference, adjust_logits_twin, adjust_logits_cpu]
MASKS = [mask_logits.reference, mask_logits_twin, mask_logits_cpu]
for level in levels():

    def draw_at(*tensors: torch.Tensor, level: str = level.values[0]) -> torch.Tensor:
        with at(level):
            return sample_cpu(*tensors)

    DRAWS.append(pytest.param(draw_at, id=level.id, marks=level.marks))


def bans(params: SamplingParams) -> list[int]:
    """What may not be drawn below `min_tokens`, as the planner says it."""
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else EOS)}
    return sorted(stops) if params.min_tokens else []


class Table:
    """Row buffers set up from requests' parameters, as a step does it."""

    def __init__(self, params: list[SamplingParams], tokens: list[list[int]], prompt: int) -> None:
        device = CpuDevice(num_threads=1)
        host = HostRows(len(params), VOCAB)
        setups = [
            RowSetup(i, 0, i, i % 3, prompt, p, token_ids=t, banned_ids=bans(p))
            for i, (p, t) in enumerate(zip(params, tokens, strict=True))
        ]

        def build() -> RowBuffers:
            rows = RowBuffers(device, len(params), 2, VOCAB)
            rows.params.fill_(-1)  # whatever an earlier sequence left
            rows.counts.fill_(77)
            rows.apply({k: torch.from_numpy(v) for k, v in host.pack(setups).items()})
            return rows

        with torch.inference_mode():
            self.rows = build()
        device.close()

    def adjust(self, function, logits, rows, positions, drafts) -> torch.Tensor:
        b = self.rows
        logits = logits.clone()
        with torch.inference_mode():
            function(logits, rows, positions, b.params, b.bias_ids, b.bias_values, b.counts, drafts)
        return logits


any_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 3, 20, 66, 67, 500]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.8]),
    presence_penalty=st.sampled_from([0.0, -1.5, 2.0]),
    frequency_penalty=st.sampled_from([0.0, -0.5, 0.25]),
    logit_bias=st.sampled_from([(), ((3, 4.0),), ((5, -100.0), (66, 2.5), (0, 1.0))]),
    min_tokens=st.sampled_from([0, 4, 100]),
    stop_token_ids=st.sampled_from([(), (7,), (2, 66)]),
    ignore_eos=st.booleans(),
    max_tokens=st.just(200),
    seed=st.integers(0, 2**64 - 1),
)


@settings(max_examples=30)
@given(st.lists(any_params, min_size=1, max_size=5), st.data())
def test_a_token_is_what_the_oracle_draws(params: list[SamplingParams], data: st.DataObject):
    generator = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    prompt = [generator.integers(0, VOCAB, 6).tolist() for _ in params]
    output = [generator.integers(0, 12, 9).tolist() for _ in params]
    table = Table(params, [p + o for p, o in zip(prompt, output, strict=True)], prompt=6)
    # Points: every row's next token, and the first row's after three drafts besides.
    drafts = generator.integers(0, 12, 3).tolist()
    rows = torch.tensor([*range(len(params)), 0], dtype=INT)
    positions = torch.tensor([*[15] * len(params), 18])
    before = torch.full((len(rows), 3), -1, dtype=INT)
    before[-1] = torch.tensor(drafts)
    logits = torch.from_numpy(generator.normal(0, 4, (len(rows), VOCAB)).astype(np.float32))
    if data.draw(st.booleans()):
        logits = logits.round()  # ties
    for adjust in ADJUSTS:
        got = table.adjust(adjust, logits, rows, positions, before)
        for n, row in enumerate(rows.tolist()):
            done = output[row] + (drafts if n == len(params) else [])
            want = sampling.adjusted(logits[n].numpy(), params[row], prompt[row], done, EOS)
            assert np.allclose(got[n].numpy(), want, rtol=1e-5, atol=1e-5)
            for draw in (sample.reference, sample_twin, sample_cpu):
                choice = row % 3
                token = draw(
                    got[n : n + 1], rows[n : n + 1], positions[n : n + 1], params_of(table)
                )
                best, margin = sampling.draw(
                    got[n].numpy().astype(np.float64), params[row], choice, int(positions[n])
                )
                if margin > 1e-4:
                    assert token.tolist() == [best]


def params_of(table: Table) -> torch.Tensor:
    return table.rows.params


@pytest.mark.parametrize("draw", DRAWS)
def test_what_overflowed_in_a_model_still_draws_a_token(draw):
    params = make_params(
        6,
        temperature=np.array([0.0, 0.8, 0.8, 0.8, 0.8, 1.0]),
        top_k=np.array([0, 0, 12, 0, 0, 5]),
        top_p=np.array([1.0, 1.0, 1.0, 0.9, 1.0, 0.9]),
        min_p=np.array([0.0, 0.0, 0.0, 0.0, 0.1, 0.1]),
    )
    rows, positions = torch.arange(6, dtype=INT), torch.arange(6)
    for value in (np.inf, np.nan):
        for places in (slice(5, 6), slice(60, 62), slice(None)):
            logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1))
            logits[:, places] = value
            tokens = draw(logits, rows, positions, params)
            assert ((tokens >= 0) & (tokens < VOCAB)).all()


@pytest.mark.parametrize("draw", DRAWS)
def test_a_row_is_drawn_alike_in_any_batch(draw):
    generator = torch.Generator().manual_seed(3)
    count = 23
    logits = torch.randn(count, VOCAB, generator=generator) * 3
    params = make_params(
        count,
        temperature=np.tile([0.0, 0.5, 1.0, 1.5, 2.0], 5)[:count],
        top_k=np.tile([0, 4, 30], 8)[:count],
        top_p=np.tile([1.0, 0.9], 12)[:count],
    )
    rows = torch.randperm(count, generator=generator).int()
    positions = torch.randint(0, 99, (count,), generator=generator)
    together = draw(logits, rows, positions, params)
    for n in range(count):
        one = slice(n, n + 1)
        assert draw(logits[one], rows[one], positions[one], params) == together[n]
    order = torch.randperm(count, generator=generator)
    assert torch.equal(draw(logits[order], rows[order], positions[order], params), together[order])


def test_noise_is_the_documented_function():
    keys = torch.tensor([signed(sampling.row_key(s, c)) for s, c in ((0, 0), (2**64 - 1, 7))])
    assert keys.tolist() == [row_key(0, 0), row_key(2**64 - 1, 7)]
    positions = torch.tensor([0, 123_456])
    ids = torch.tensor([0, 1, 77, 151_935, 2**31 - 1], dtype=INT)
    low, high = position_keys(keys, positions)
    bits = hash_ids(low[:, None], high[:, None], ids)
    noise = gumbel(low[:, None], high[:, None], ids)
    for n in range(2):
        for i, token in enumerate(ids.tolist()):
            key = int(keys[n]) & sampling.M64
            assert bits[n, i] == sampling.noise_bits(key, int(positions[n]), token)
            want = sampling.gumbel(key, int(positions[n]), token)
            assert math.isclose(float(noise[n, i]), want, rel_tol=1e-5, abs_tol=1e-5)


def signed(key: int) -> int:
    return key - 2**64 if key >= 2**63 else key


def test_noise_is_finite_at_the_ends_of_its_range():
    bits = torch.tensor([0, 1, 2**31 - 1, 2**31 - 2, 2**30], dtype=INT)
    v = (bits.float() + 0.5) * (2.0**-31 - 2.0**-55)
    assert float(v.max()) < 1
    assert torch.isfinite(-torch.log(-torch.log1p(-v))).all()


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """The statistic's distance from its mean in standard deviations; rare cells pooled."""
    rare = expected < 10
    if rare.any():
        counts = np.append(counts[~rare], counts[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
        if expected[-1] < 5:
            counts, expected = counts[:-1], expected[:-1]
    freedom = max(len(counts) - 1, 1)
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float((statistic - freedom) / math.sqrt(2 * freedom))


STATISTICS = [
    pytest.param({"temperature": 1.0}, id="plain"),
    pytest.param({"temperature": 0.4}, id="cold"),
    pytest.param({"temperature": 3.0}, id="hot"),
    pytest.param({"top_k": 5}, id="top-k"),
    pytest.param({"top_p": 0.7}, id="top-p"),
    pytest.param({"min_p": 0.1}, id="min-p"),
    pytest.param({"temperature": 1.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02}, id="all"),
]


@pytest.mark.parametrize("fields", STATISTICS)
@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize("draw", DRAWS[-1:])
def test_draws_follow_the_exact_distribution(fields: dict[str, float], vary: str, draw):
    """Over seeds at one position, and over the positions of one seed."""
    draws = 40_000
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    wanted = sampling.probabilities(logits.double().numpy(), SamplingParams(**fields))
    table = make_params(draws if vary == "seed" else 1, **fields)
    rows = torch.arange(draws, dtype=INT) if vary == "seed" else torch.zeros(draws, dtype=INT)
    positions = torch.full((draws,), 9) if vary == "seed" else torch.arange(draws)
    tokens = draw(logits.expand(draws, -1), rows, positions, table)
    counts = np.bincount(tokens.numpy(), minlength=VOCAB)
    assert not counts[wanted == 0].any()
    assert abs(chi_square(counts[wanted > 0], draws * wanted[wanted > 0])) < 4.5


def test_neighbours_are_independent():
    """Pairs of draws at adjacent positions, and of adjacent choices of one seed."""
    draws, cells = 60_000, 8
    logits = torch.linspace(0, 2, cells)
    p = torch.softmax(logits, 0).double().numpy()
    expected = draws * np.outer(p, p).ravel()
    keys = np.array([[row_key(seed, choice) for choice in (0, 1)] for seed in range(draws)])
    table = make_params(2 * draws, key=keys.ravel())
    many = logits.expand(2 * draws, -1)
    rows = torch.arange(2 * draws, dtype=INT)
    choices = sample(many, rows, torch.full((2 * draws,), 3), table).view(-1, 2)
    positions = sample(many, rows // 2 * 2, torch.tensor([3, 4]).repeat(draws), table).view(-1, 2)
    for pairs in (choices, positions):
        counts = np.bincount((pairs[:, 0] * cells + pairs[:, 1]).numpy(), minlength=cells**2)
        assert abs(chi_square(counts, expected)) < 4.5


def test_equal_values_stay_or_go_together():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 2.0, 0.0]])
    draws = 3000
    table = make_params(draws, top_k=2)
    rows, positions = torch.arange(draws, dtype=INT), torch.zeros(draws, dtype=torch.int64)
    drawn = set(sample(logits.expand(draws, -1), rows, positions, table).tolist())
    assert drawn == {1, 2, 3}


def test_greedy_takes_the_lowest_id_of_equals():
    logits = torch.zeros(2, 9)
    logits[1, [4, 7]] = 1.0
    table = make_params(2, temperature=0.0)
    rows = torch.arange(2, dtype=INT)
    assert sample(logits, rows, torch.zeros(2, dtype=torch.int64), table).tolist() == [0, 4]


SHAPES = [
    pytest.param({}, id="plain"),
    pytest.param({"top_p": np.linspace(0.05, 0.999, 12)}, id="top-p"),
    pytest.param({"top_k": np.arange(12) * 250 + 1}, id="top-k"),
    pytest.param({"min_p": np.geomspace(1e-9, 1.0, 12)}, id="min-p"),
    pytest.param({"top_k": 400, "top_p": np.linspace(0.2, 1.0, 12), "min_p": 1e-3}, id="all"),
]


@pytest.mark.parametrize("draw", DRAWS[1:])
@pytest.mark.parametrize("fields", SHAPES)
@pytest.mark.parametrize("spread", [0.1, 3.0, 12.0])
def test_thresholds_wherever_they_lie(draw, fields, spread):
    """Flat and peaked distributions: many or few values hold the mass, shortcuts suffice or not."""
    vocab, draws = 3001, 12
    logits = torch.randn(draws, vocab, generator=torch.Generator().manual_seed(2)) * spread
    logits[:, ::5] = -math.inf
    table = make_params(draws, temperature=np.tile([1.0, 0.6, 2.5], 4), **fields)
    rows = torch.arange(draws, dtype=INT)
    for position in range(8):
        positions = torch.full((draws,), position)
        wanted = sample.reference(logits, rows, positions, table)
        assert torch.equal(draw(logits, rows, positions, table), wanted)


@pytest.mark.parametrize("draw", DRAWS)
def test_rows_with_nothing_allowed_give_the_first_id(draw):
    logits = torch.full((3, 40), -math.inf)
    table = make_params(3, temperature=np.array([0.0, 1.0, 1.0]), top_k=np.array([0, 0, 5]))
    rows, positions = torch.arange(3, dtype=INT), torch.zeros(3, dtype=torch.int64)
    assert draw(logits, rows, positions, table).tolist() == [0, 0, 0]
    logits[:, 23] = -50.0
    assert draw(logits, rows, positions, table).tolist() == [23, 23, 23]


@settings(max_examples=30)
@given(
    st.one_of(st.integers(1, 130), st.integers(8170, 16_500)),
    st.integers(1, 6),
    st.integers(0, 2**32),
)
def test_masks_ban_exactly_the_unset_bits(vocab: int, rows: int, seed: int):
    generator = np.random.default_rng(seed)
    allowed = generator.random((rows, vocab)) < 0.5
    padded = np.zeros((rows, -(-vocab // 32) * 32), bool)
    padded[:, :vocab] = allowed
    bits = np.packbits(padded, axis=1, bitorder="little").view(np.int32)
    indices = generator.permutation(rows + 2)[:rows].astype(np.int32)
    indices[generator.random(rows) < 0.3] = -1
    logits = torch.randn(rows + 2, vocab)
    want = logits.clone()
    for i, index in enumerate(indices.tolist()):
        if index >= 0:
            want[index, torch.from_numpy(~allowed[i])] = -math.inf
    for mask in MASKS:
        masked = logits.clone()
        mask(masked, torch.from_numpy(indices), torch.from_numpy(bits))
        assert torch.equal(masked, want)


def on_threads(count: int, function, *arguments):
    """The result with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function(*arguments)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("level", levels())
def test_native_penalties_are_the_references_bit_for_bit(level, threads):
    """Over several pieces of a large vocabulary; of drafts said twice, and counted before."""
    vocab, count, num_drafts = 20_011, 5, 4
    generator = torch.Generator().manual_seed(4)
    params = make_params(
        count,
        repetition_penalty=np.linspace(0.7, 1.9, count),
        presence_penalty=np.linspace(-2.0, 1.7, count),
        frequency_penalty=np.linspace(1.1, -0.9, count),
        needs_counts=np.array([1, 1, 0, 1, 1]),
        min_length=np.array([9, 0, 9, 9, 0]),
        num_bans=2,
        num_biases=7,
    )
    counts = torch.randint(0, 5, (count, vocab), generator=generator).int()
    counts *= torch.randint(0, 2, (count, vocab), generator=generator).int()
    counts += torch.randint(0, 2, (count, vocab), generator=generator).int() * SEEN_IN_PROMPT
    bias_ids = torch.randint(0, vocab, (count, 8), generator=generator).int()
    bias_values = torch.randn(count, 8, generator=generator)
    bias_values[:, :2] = -math.inf
    drafts = torch.randint(0, vocab, (count, num_drafts), generator=generator).int()
    drafts[:, 2] = drafts[:, 0]
    drafts[1, 3] = -1
    counts[0, drafts[0, 1]] = counts[3, drafts[3, 0]] = 0
    logits = torch.randn(count, vocab, generator=generator) * 5
    rest = (torch.arange(count, dtype=INT), torch.arange(count) + 5, params, bias_ids, bias_values)
    want, got = logits.clone(), logits.clone()
    adjust_logits.reference(want, *rest, counts, drafts)
    with at(level):
        on_threads(threads, adjust_logits_cpu, got, *rest, counts, drafts)
    assert torch.equal(got, want)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("draw", DRAWS[2:])
def test_pieces_of_a_large_vocabulary_give_one_token(draw, threads):
    """Every kind of row; of equal values in two pieces the lower id is drawn."""
    vocab, kinds = 3 * 8192 + 77, 8
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(kinds, vocab, generator=generator) * 3
    logits[0, [8191, 8192, 24_000]] = 99.0
    logits[6] *= 0.01  # flat: nearly all values are kept
    params = make_params(
        kinds,
        temperature=np.array([0.0, 1.0, 0.7, 1.2, 1.0, 1.5, 1.0, 0.0]),
        top_k=np.array([0, 0, 50, 0, 0, 900, 0, 5]),
        top_p=np.array([1.0, 1.0, 1.0, 0.9, 1.0, 0.8, 0.99, 0.5]),
        min_p=np.array([0.0, 0.0, 0.0, 0.0, 0.05, 0.001, 0.0, 0.0]),
    )
    rows = torch.arange(kinds, dtype=INT)
    for position in range(6):
        positions = torch.full((kinds,), position)
        want = sample.reference(logits, rows, positions, params)
        assert torch.equal(on_threads(threads, draw, logits, rows, positions, params), want)
        for n in range(kinds):  # alone
            one = (logits[n : n + 1], rows[n : n + 1], positions[n : n + 1], params)
            assert on_threads(threads, draw, *one).tolist() == [int(want[n])]
    assert want[0] == 8191


def test_setups_write_counts_and_bans():
    params = [
        SamplingParams(frequency_penalty=0.5),
        SamplingParams(min_tokens=2, max_tokens=9, stop_token_ids=(9, 2), logit_bias={7: 1.5}),
        SamplingParams(min_tokens=2, max_tokens=9, ignore_eos=True),
    ]
    rows = Table(params, [[4, 4, 1, 6, 6, 4], [], []], prompt=3).rows
    counted = rows.counts[0]
    assert counted[4] == SEEN_IN_PROMPT + 1
    assert counted[1] == SEEN_IN_PROMPT
    assert counted[6] == 2
    assert int((counted != 0).sum()) == 3
    assert rows.bias_ids[1, :4].tolist() == [2, 5, 9, 7]
    assert rows.bias_values[1, :4].tolist() == [-math.inf, -math.inf, -math.inf, 1.5]
    assert rows.params.view(torch.int32)[2, 8:10].tolist() == [0, 0]
