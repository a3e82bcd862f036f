"""Training batches: a step's documents, sorted by length into padded micro-batches.

Documents are never packed behind one another, so every one is learnt in the position and context
in which it will be asked. A step is a pure function of (seed, step): training resumes anywhere.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tools.train_tiny import corpus, mixes


@dataclass(frozen=True)
class MicroBatch:
    """ids [rows, length + 1]; weights [rows, length], of the loss on ids[:, 1:]; fits [rows,
    length]: 1 where a tool that ends at ids[:, :-1] fits, 0 where it does not, else NaN; topics
    [rows, length]: what the text that ends there is about, -1 where it is not asked."""

    ids: Tensor
    weights: Tensor
    fits: Tensor
    topics: Tensor


@dataclass(frozen=True)
class Encoded:
    """Token ids, the loss weight of each, and what is known at some positions."""

    ids: list[int]
    weights: list[float]
    marks: dict[int, corpus.Mark] = field(default_factory=dict)


def encode(sample: corpus.Sample, tokenizer: Tokenizer, context: int) -> Encoded:
    """A document in tokens, cut at `context` + 1."""
    ids: list[int] = []
    weights: list[float] = []
    marks: dict[int, corpus.Mark] = {}
    known = dict(sample.marks)
    for i, (text, weight) in enumerate(sample.spans):
        span = tokenizer.encode(text).ids
        ids += span
        weights += [weight] * len(span)
        if i in known and len(ids) <= context:
            marks[len(ids) - 1] = known[i]
    return Encoded(ids[: context + 1], weights[: context + 1], marks)


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
        count += len(encoded[-1].ids)
        if count >= tokens:
            break
    return grouped(encoded, tokens // 4)


def grouped(encoded: list[Encoded], tokens: int) -> list[MicroBatch]:
    """Micro-batches of documents of similar length, each of at most `tokens` with its padding."""
    groups: list[list[Encoded]] = [[]]
    for each in sorted(encoded, key=lambda each: len(each.ids)):
        if groups[-1] and (len(groups[-1]) + 1) * len(each.ids) > tokens:
            groups.append([])
        groups[-1].append(each)
    return [_padded(group) for group in groups]


def _padded(group: list[Encoded]) -> MicroBatch:
    length = max(len(each.ids) for each in group)
    ids = torch.zeros(len(group), length, dtype=torch.long)
    weights = torch.zeros(len(group), length)
    fits = torch.full((len(group), length), math.nan)
    topics = torch.full((len(group), length), -1)
    for row, each in enumerate(group):
        ids[row, : len(each.ids)] = torch.tensor(each.ids)
        weights[row, : len(each.weights)] = torch.tensor(each.weights)
        for at, mark in each.marks.items():
            if mark.topic is not None:
                topics[row, at] = mark.topic
            if mark.fits is not None:
                fits[row, at] = mark.fits
    return MicroBatch(ids, weights[:, 1:], fits[:, :-1], topics[:, :-1])
