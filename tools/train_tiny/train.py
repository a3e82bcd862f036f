"""Train the bundled model: `python -m tools.train_tiny.train --work DIR`.

The result is `DIR/model`; the same command takes a stopped run up again.
"""

import argparse

import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from tools.train_tiny import batches, tokenizer, trainer
from tools.train_tiny.model import TINY, Qwen3


def weighted_loss(model: Qwen3, batch: batches.MicroBatch) -> Tensor:
    """Sum of weighted cross-entropies; the head runs only where there is a weight."""
    hidden, _ = model.hidden(batch.ids[:, :-1])
    learnt = batch.weights > 0
    losses = F.cross_entropy(
        model.logits(hidden[learnt]), batch.ids[:, 1:][learnt], reduction="none"
    )
    return (losses * batch.weights[learnt]).sum()


def work(rank: int, job: trainer.Job) -> None:
    trainer.meet(rank, job)
    made = (job.start or job.work / "model") / "tokenizer.json"
    tok = Tokenizer.from_file(str(made)) if made.exists() else tokenizer.train(job.seed)
    context = job.config.max_position_embeddings

    def batches_of(step: int) -> list[batches.MicroBatch]:
        long = trainer.is_long(step)
        return batches.step_batches(job.seed, step, job.tokens, tok, context, long)

    trainer.train(job, tok, weighted_loss, batches_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    trainer.add_options(parser, steps=2250, decay=1400)
    args = parser.parse_args()
    trainer.launch(work, trainer.Job(config=TINY, **vars(args)))


if __name__ == "__main__":
    main()
