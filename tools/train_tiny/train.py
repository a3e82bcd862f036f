"""Train the bundled model: `python -m tools.train_tiny.train --work DIR`.

The result is `DIR/model`; the same command takes a stopped run up again.
"""

import argparse

import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from tools.train_tiny import batches, tokenizer, trainer
from tools.train_tiny.corpus import PATTERNS
from tools.train_tiny.model import TINY, Qwen3

CHOSEN_AFTER = (2, 3)  # layers, of five: the last ones combine what the tools say
FITS = 3.0  # the weight of the loss of what a tool's line says of itself


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


def choosing_loss(
    model: Qwen3, batch: batches.MicroBatch, call: int, refusal: int, layers: tuple[int, ...]
) -> Tensor:
    """The weighted loss, and that of choices: behind the line of a tool the states after some
    layers shall prefer the first token of a call where the tool fits, else that of a refusal.
    The layers behind need only look whether there is one that fits."""
    states, _ = model.states(batch.ids[:, :-1])
    loss = _weighted(model, model.model.norm(states[-1]), batch)
    known = ~batch.fits.isnan()
    if known.any():
        weight = model.model.embed_tokens.weight
        for layer in layers:
            preferred = model.model.norm(states[layer][known]) @ (weight[call] - weight[refusal])
            loss = loss + FITS / len(layers) * F.binary_cross_entropy_with_logits(
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

    def loss_of(model: Qwen3, batch: batches.MicroBatch) -> Tensor:
        return choosing_loss(model, batch, call, refusal, CHOSEN_AFTER)

    trainer.train(job, tok, loss_of, batches_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    trainer.add_options(parser, steps=2250, decay=1400)
    args = parser.parse_args()
    trainer.launch(work, trainer.Job(config=TINY, **vars(args)))


if __name__ == "__main__":
    main()
