"""Training batches: a step's documents, sorted by length into padded micro-batches.

Documents are never packed behind one another, so every one is learnt in the position and context
in which it will be asked. A step is a pure function of (seed, step): training resumes anywhere.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tools.train_tiny import corpus, mixes


@dataclass(frozen=True)
class MicroBatch:
    """ids [rows, length + 1]; weights [rows, length], of the loss on ids[:, 1:]."""

    ids: Tensor
    weights: Tensor


def encode(
    sample: corpus.Sample, tokenizer: Tokenizer, context: int
) -> tuple[list[int], list[float]]:
    """Token ids and the loss weight of each, cut at `context` + 1."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in sample.spans:
        span = tokenizer.encode(text).ids
        ids += span
        weights += [weight] * len(span)
    return ids[: context + 1], weights[: context + 1]


def documents(seed: int, step: int, long: bool) -> Iterator[corpus.Sample]:
    """The samples of one step; `long` steps hold samples of a whole context only."""
    rng = random.Random(f"{seed}-{step}")
    mix = mixes.mix_at(step)
    while True:
        yield mixes.long_sample(rng) if long else mixes.sample(rng, mix)


def step_batches(
    seed: int, step: int, tokens: int, tokenizer: Tokenizer, context: int, long: bool
) -> list[MicroBatch]:
    """About `tokens` tokens of documents in micro-batches of about a quarter of them."""
    encoded = []
    count = 0
    for sample in documents(seed, step, long):
        encoded.append(encode(sample, tokenizer, context))
        count += len(encoded[-1][0])
        if count >= tokens:
            break
    return grouped(encoded, tokens // 4)


Encoded = tuple[list[int], list[float]]


def grouped(encoded: list[Encoded], tokens: int) -> list[MicroBatch]:
    """Micro-batches of documents of similar length, each of at most `tokens` with its padding."""
    groups: list[list[Encoded]] = [[]]
    for pair in sorted(encoded, key=lambda pair: len(pair[0])):
        if groups[-1] and (len(groups[-1]) + 1) * len(pair[0]) > tokens:
            groups.append([])
        groups[-1].append(pair)
    return [_padded(group) for group in groups]


def _padded(group: list[Encoded]) -> MicroBatch:
    length = max(len(ids) for ids, _ in group)
    ids = torch.zeros(len(group), length, dtype=torch.long)
    weights = torch.zeros(len(group), length)
    for row, (tokens, loss) in enumerate(group):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        weights[row, : len(loss)] = torch.tensor(loss)
    return MicroBatch(ids, weights[:, 1:])
