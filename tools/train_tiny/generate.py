"""Generation for training and evaluation: batches of prompts, with a KV cache.

Sampling at temperature 1 adds Gumbel noise keyed by (seed, prompt, position) and takes the largest
sum (the Gumbel-max trick), so target and draft can be sampled with the same noise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tools.train_tiny.model import Qwen3


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 (greedy) or 1; at 1, `noise` gives the same values for the same key."""

    temperature: int
    seed: int = 0

    def noise(self, prompt: int, positions: int, vocab: int) -> Tensor:
        """Gumbel noise [positions, vocab] of the `prompt`-th prompt; zero when greedy."""
        if self.temperature == 0:
            return torch.zeros(1, 1).expand(positions, vocab)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + prompt)
        uniform = torch.rand(positions, vocab, generator=generator).clamp_(1e-9, 1 - 1e-7)
        return uniform.log_().neg_().log_().neg_()


GREEDY = Sampling(0)


@torch.no_grad()
def generate(
    model: Qwen3,
    prompts: list[list[int]],
    limit: int,
    eos: list[int],
    sampling: Sampling = GREEDY,
    batch: int = 128,
) -> list[list[int]]:
    """The generated ids of every prompt, the end-of-sequence id included where it came."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: list[list[int]] = [[] for _ in prompts]
    for first in range(0, len(order), batch):
        group = order[first : first + batch]
        noise = [sampling.noise(i, limit, model.config.vocab_size) for i in group]
        outputs = _generate_group(model, [prompts[i] for i in group], noise, limit, eos)
        for i, output in zip(group, outputs, strict=True):
            results[i] = output
    return results


def _generate_group(
    model: Qwen3, prompts: list[list[int]], noise: list[Tensor], limit: int, eos: list[int]
) -> list[list[int]]:
    """All rows stand at the same position: a row whose prompt is longer reads on while the others
    already write."""
    outputs: list[list[int]] = [[] for _ in prompts]
    position = min(map(len, prompts))
    hidden, cache = model.hidden(torch.tensor([prompt[:position] for prompt in prompts]))
    while True:
        logits = model.logits(hidden[:, -1])
        for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            if position >= len(prompt) and len(output) < limit:
                logits[row] += noise[row][len(output)]
        step = logits.argmax(dim=-1).tolist()
        for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            if position < len(prompt):
                step[row] = prompt[position]
            elif len(output) < limit and (not output or output[-1] not in eos):
                output.append(step[row])
        if all(len(o) == limit or (o and o[-1] in eos) for o in outputs):
            return outputs
        hidden, cache = model.hidden(torch.tensor(step)[:, None], cache)
        position += 1


@torch.no_grad()
def agreement(
    draft: Qwen3, prompt: list[int], output: list[int], index: int, sampling: Sampling
) -> list[bool]:
    """Per output token of the target: whether the draft, given the target's text so far and the
    same noise, takes the same token."""
    ids = torch.tensor([prompt + output[:-1]])
    hidden, _ = draft.hidden(ids)
    logits = draft.logits(hidden[0, len(prompt) - 1 :])
    noise = sampling.noise(index, len(output), logits.shape[-1])
    return ((logits + noise).argmax(dim=-1) == torch.tensor(output)).tolist()
