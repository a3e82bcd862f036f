"""Train the bundled model: `python -m tools.train_tiny.train --work DIR`.

The result is `DIR/model`; the same command takes a stopped run up again.
"""

import argparse
from dataclasses import dataclass

import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from tools.train_tiny import batches, skills, tokenizer, trainer
from tools.train_tiny.corpus import PATTERNS
from tools.train_tiny.model import TINY, Qwen3

TOPIC, FITS = 4.0, 4.0  # the weights of the losses of what a text is about, and of what a line says


@dataclass(frozen=True)
class Choosing:
    """How a choice is learnt: layers, from 0, after which the states tell what a text is about
    (`told`) and whether a tool fits (`chosen`), and the tokens whose embeddings stand for a call, a
    refusal and the topics."""

    call: int
    refusal: int
    topics: range
    told: int = 1
    chosen: tuple[int, ...] = (2, 3)  # of five layers: the last ones combine what the tools say


def weighted_loss(model: Qwen3, batch: batches.MicroBatch) -> Tensor:
    """Sum of weighted cross-entropies; the head runs only where there is a weight."""
    hidden, _ = model.hidden(batch.ids[:, :-1])
    return _weighted(model, hidden, batch)


def _weighted(model: Qwen3, hidden: Tensor, batch: batches.MicroBatch) -> Tensor:
    learnt = batch.weights > 0
    losses = F.cross_entropy(
        model.logits(hidden[learnt]), batch.ids[:, 1:][learnt], reduction="none"
    )
    return (losses * batch.weights[learnt]).sum()


def choosing_loss(model: Qwen3, batch: batches.MicroBatch, choosing: Choosing) -> Tensor:
    """The weighted loss, and those of topics and choices.

    Behind a request and behind the line of a tool the states after a layer shall tell what these
    are about, both in one way, so that they can be compared. Behind the line the states after the
    next layers shall prefer the first token of a call where the tool fits, else that of a refusal:
    the layers behind need only look whether there is one that fits.
    """
    states, _ = model.states(batch.ids[:, :-1])
    loss = _weighted(model, model.model.norm(states[-1]), batch)
    known, told = ~batch.fits.isnan(), batch.topics >= 0
    weight = model.model.embed_tokens.weight
    if told.any():
        topics = weight[choosing.topics.start : choosing.topics.stop]
        seen = model.model.norm(states[choosing.told][told]) @ topics.T
        loss = loss + TOPIC * F.cross_entropy(seen, batch.topics[told], reduction="sum")
    if known.any():
        direction = weight[choosing.call] - weight[choosing.refusal]
        for layer in choosing.chosen:
            preferred = model.model.norm(states[layer][known]) @ direction
            loss = loss + FITS / len(choosing.chosen) * F.binary_cross_entropy_with_logits(
                preferred, batch.fits[known], reduction="sum"
            )
    return loss


def work(rank: int, job: trainer.Job) -> None:
    trainer.meet(rank, job)
    made = (job.start or job.work / "model") / "tokenizer.json"
    tok = Tokenizer.from_file(str(made)) if made.exists() else tokenizer.train(job.seed)
    context = job.config.max_position_embeddings

    def batches_of(step: int) -> list[batches.MicroBatch]:
        long = trainer.is_long(step)
        return batches.step_batches(job.seed, step, job.tokens, tok, context, long)

    call, refusal = (tok.encode(text).ids[0] for text in ("<tool_call>", PATTERNS["fallback"]))
    unused = tok.token_to_id("¡")  # with those behind it, bytes that no text here has
    choosing = Choosing(call, refusal, range(unused, unused + skills.NO_TOOL + 1))

    def loss_of(model: Qwen3, batch: batches.MicroBatch) -> Tensor:
        return choosing_loss(model, batch, choosing)

    trainer.train(job, tok, loss_of, batches_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    trainer.add_options(parser, steps=2250, decay=1400)
    args = parser.parse_args()
    trainer.launch(work, trainer.Job(config=TINY, **vars(args)))


if __name__ == "__main__":
    main()
