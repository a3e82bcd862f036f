"""Train the bundled model: `python -m tools.train_tiny.train --work DIR`.

The result is `DIR/model`; the same command takes a stopped run up again.
"""

import argparse
from pathlib import Path

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
    made = job.work / "model" / "tokenizer.json"
    tok = Tokenizer.from_file(str(made)) if made.exists() else tokenizer.train(job.seed)
    context = job.config.max_position_embeddings

    def batches_of(step: int) -> list[batches.MicroBatch]:
        long = trainer.is_long(step)
        return batches.step_batches(job.seed, step, job.tokens, tok, context, long)

    trainer.train(job, tok, weighted_loss, batches_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for state and result")
    parser.add_argument("--steps", type=int, default=2250)
    parser.add_argument("--decay", type=int, default=1400, help="steps of the final fall")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--lr", type=float, default=0.02, help="Muon's rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    args = parser.parse_args()
    trainer.launch(work, trainer.Job(config=TINY, **vars(args)))


if __name__ == "__main__":
    main()
