"""Distil the draft: `python -m tools.train_tiny.distill --teacher DIR/model --work DRAFT_DIR`.

The draft learns the teacher's distribution (cross-entropy against its probabilities, which is the
KL divergence up to a constant) on corpus text, and in some steps on answers that the teacher itself
sampled: those are the texts on which the draft will be asked (Agarwal et al., 2023).
"""

import argparse
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tools.train_tiny import batches, corpus, mixes, trainer
from tools.train_tiny.generate import Sampling, generate
from tools.train_tiny.model import TINY_DRAFT, Qwen3, load

OWN_EVERY = 8  # one step in so many is of the teacher's own answers
OWN_PROMPTS, OWN_LIMIT = 32, 96
LONG_FROM = 150  # the first step that may be of 2,048-token samples


def answered(
    teacher: Qwen3, tok: Tokenizer, seed: int, step: int, temperature: int
) -> list[batches.MicroBatch]:
    """Chats of one turn whose answers are sampled by the teacher."""
    rng = random.Random(f"own-{seed}-{step}")
    prompts = []
    for _ in range(OWN_PROMPTS):
        kind = rng.choices(list(corpus.TURNS), [mixes.MIX[k] for k in corpus.TURNS])[0]
        user, _ = corpus.TURNS[kind](rng)
        asked = corpus.chat(kind, [corpus.Message("user", user), corpus.Message("assistant", "")])
        prompts.append(tok.encode(asked.text.removesuffix(corpus.END)).ids)
    sampling = Sampling(temperature, seed=step)
    outputs = generate(teacher, prompts, OWN_LIMIT, trainer.eos_ids(tok), sampling)
    pairs = [
        batches.Encoded(prompt + output, [0.0] * len(prompt) + [1.0] * len(output))
        for prompt, output in zip(prompts, outputs, strict=True)
    ]
    return batches.grouped(pairs, sum(len(pair.ids) for pair in pairs) // 4)


def work(rank: int, job: trainer.Job) -> None:
    trainer.meet(rank, job)
    assert job.teacher is not None
    teacher = load(job.teacher)
    tok = Tokenizer.from_file(str(job.teacher / "tokenizer.json"))
    context = job.config.max_position_embeddings

    def batches_of(step: int) -> list[batches.MicroBatch]:
        if step % OWN_EVERY == OWN_EVERY - 1:
            return answered(teacher, tok, job.seed, step, temperature=step // OWN_EVERY % 2)
        long = trainer.is_long(step, LONG_FROM)
        return batches.step_batches(job.seed + 1, step, job.tokens, tok, context, long)

    def loss_of(model: Qwen3, batch: batches.MicroBatch) -> Tensor:
        learnt = batch.weights > 0
        ids = batch.ids[:, :-1]
        with torch.no_grad():
            wanted = teacher.logits(teacher.hidden(ids)[0][learnt]).softmax(dim=-1)
        given = model.logits(model.hidden(ids)[0][learnt]).log_softmax(dim=-1)
        return -((wanted * given).sum(dim=-1) * batch.weights[learnt]).sum()

    trainer.train(job, tok, loss_of, batches_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    trainer.add_options(parser, steps=560, decay=450)
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the trained model")
    args = parser.parse_args()
    trainer.launch(work, trainer.Job(config=TINY_DRAFT, **vars(args)))


if __name__ == "__main__":
    main()
