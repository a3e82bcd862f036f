"""The training loop of the model and of its draft: seeded, resumable, some one-thread workers.

A step is a pure function of (seed, step), so a run that was stopped goes on as if it had not been.
The learning rate is constant and then falls to zero over the last `decay` steps; the plateau does
not depend on `steps`, so the length of a run can be decided late.
"""

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor

from tools.train_tiny import batches, corpus, tokenizer
from tools.train_tiny.model import Config, Qwen3, initialise, load, save
from tools.train_tiny.optimizer import optimizers

WARMUP = 40
LONG_EVERY, LONG_FROM = 8, 500  # one step in so many, from there on, is of 2,048-token samples


@dataclass(frozen=True)
class Job:
    """What to train and for how long; `teacher` is the folder of the model to distil, if any.

    A run begins at step `first`: with the weights in the folder `start`, or with random ones."""

    config: Config
    work: Path
    steps: int
    decay: int
    tokens: int
    lr: float
    seed: int
    save_every: int
    workers: int
    first: int = 0
    start: Path | None = None
    teacher: Path | None = None


Loss = Callable[[Qwen3, batches.MicroBatch], Tensor]
Batches = Callable[[int], list[batches.MicroBatch]]


def learning_rate(step: int, steps: int, decay: int, first: int = 0) -> float:
    """The factor on the base rate: warm-up from step `first`, plateau, linear fall to zero."""
    return min(1.0, (step - first + 1) / WARMUP, (steps - step) / decay)


def is_long(step: int, first: int = LONG_FROM) -> bool:
    return step >= first and step % LONG_EVERY == 0


def eos_ids(tok: Tokenizer) -> list[int]:
    return [tok.token_to_id(corpus.END), tok.token_to_id(corpus.DOCUMENT_END)]


def export(model: Qwen3, tok: Tokenizer, folder: Path) -> None:
    """The Hugging Face layout: config, weights, tokenizer, chat template."""
    eos = eos_ids(tok)
    save(model, folder, eos, pad=eos[1])
    tokenizer.save(tok, folder, model.config.max_position_embeddings)


def checkpoint(path: Path, step: int, model: Qwen3, optims: list[torch.optim.Optimizer]) -> None:
    state = {"step": step, "model": model.state_dict(), "optims": [o.state_dict() for o in optims]}
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def resume(path: Path, model: Qwen3, optims: list[torch.optim.Optimizer], first: int = 0) -> int:
    """Load the state, if there is one, and return the next step."""
    if not path.exists():
        return first
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optim, saved in zip(optims, state["optims"], strict=True):
        optim.load_state_dict(saved)
    return int(state["step"])


def share_gradients(params: list[Tensor]) -> None:
    """Sum the gradients over all workers, in one message."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = part.view_as(p)


def meet(rank: int, job: Job) -> None:
    """Join the workers. Workers of one thread each meet once a step, so a busy machine delays them
    less than it would delay one process whose threads meet at every operation."""
    torch.set_num_threads(1)
    meeting = f"file://{job.work.resolve()}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=job.workers)


def train(job: Job, tok: Tokenizer, loss_of: Loss, batches_of: Batches) -> None:
    """Run the job in this worker: it takes every `workers`-th micro-batch of each step.

    `loss_of` sums over a micro-batch; the step's loss is the mean over all weights of the step.
    Worker 0 reports and saves. Raises FloatingPointError when the loss is not finite.
    """
    rank = dist.get_rank()
    model = Qwen3(job.config)
    initialise(model, job.seed)
    if job.start is not None:
        model.load_state_dict(load(job.start).state_dict())
    optims = optimizers(model, job.lr)
    base = [group["lr"] for optim in optims for group in optim.param_groups]
    state = job.work / "state.pt"
    first = resume(state, model, optims, job.first)
    began, seen = time.monotonic(), 0
    for step in range(first, job.steps):
        group = batches_of(step)
        total = sum(float(batch.weights.sum()) for batch in group)
        seen += sum(batch.weights.numel() for batch in group)
        loss = torch.zeros(())
        for batch in group[rank :: job.workers]:
            part = loss_of(model, batch) / total
            part.backward()
            loss += part.detach()
        share_gradients(list(model.parameters()))
        factor = learning_rate(step, job.steps, job.decay, job.first)
        for optim, lr in zip(optims, base, strict=True):
            for param_group in optim.param_groups:
                param_group["lr"] = lr * factor
            optim.step()
            optim.zero_grad(set_to_none=True)
        if step % 10 == 0:
            dist.all_reduce(loss)
            if not math.isfinite(loss):
                raise FloatingPointError(f"loss is {loss} at step {step}")
            if rank == 0:
                rate = seen / (time.monotonic() - began)
                print(f"step {step} loss {loss:.4f} lr {factor:.3f} {rate:.0f} tok/s", flush=True)
        if rank == 0 and ((step + 1) % job.save_every == 0 or step + 1 == job.steps):
            checkpoint(state, step + 1, model, optims)
            export(model, tok, job.work / "model")


def add_options(parser: argparse.ArgumentParser, *, steps: int, decay: int) -> None:
    """The fields of a `Job`; `steps` and `decay` are defaults."""
    add = parser.add_argument
    add("--work", type=Path, required=True, help="folder for state and result")
    add("--steps", type=int, default=steps)
    add("--decay", type=int, default=decay, help="steps of the final fall")
    add("--first", type=int, default=0, help="the step to begin with")
    add("--start", type=Path, help="folder of the weights to begin with, else random ones")
    add("--tokens", type=int, default=4096, help="tokens per step")
    add("--lr", type=float, default=0.02, help="Muon's rate")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=100)
    add("--workers", type=int, default=2, help="processes of one thread each")


def launch(worker: Callable[[int, Job], None], job: Job) -> None:
    """Run `worker(rank, job)` in `job.workers` processes."""
    job.work.mkdir(parents=True, exist_ok=True)
    (job.work / "meeting").unlink(missing_ok=True)
    torch.multiprocessing.spawn(worker, (job,), nprocs=job.workers)
