"""Muon for matrices, AdamW for the rest.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum
of each weight matrix with a Newton-Schulz iteration: more progress per step than AdamW, which
counts where tokens are few, for about a tenth more time.
"""

from collections import defaultdict

import torch
import torch.distributed as dist
from torch import Tensor, nn

_QUINTIC = (3.4445, -4.7750, 2.0315)  # drives singular values of [0, 1] to about 1 in 5 rounds


def orthogonalised(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Each matrix [n, rows, columns], rows <= columns, with singular values near 1."""
    a, b, c = _QUINTIC
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def shared_orthogonalised(matrices: Tensor) -> Tensor:
    """The same, each worker doing its part of the stack (gradients are equal on all workers)."""
    workers = dist.get_world_size()
    share = -(-len(matrices) // workers)
    padded = torch.cat((matrices, matrices[: share * workers - len(matrices)]))
    mine = orthogonalised(padded[dist.get_rank() * share :][:share])
    parts = [torch.empty_like(mine) for _ in range(workers)]
    dist.all_gather(parts, mine)
    return torch.cat(parts)[: len(matrices)]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; the step is scaled by sqrt(rows / columns) where rows exceed."""

    def __init__(
        self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(state["momentum"], group["momentum"])
                wide = update if update.shape[0] <= update.shape[1] else update.T
                by_shape[tuple(wide.shape)].append((weight, wide))
            for pairs in by_shape.values():
                updates = shared_orthogonalised(torch.stack([wide for _, wide in pairs]))
                for (weight, _), update in zip(pairs, updates, strict=True):
                    rows, columns = weight.shape
                    step = update if rows <= columns else update.T
                    weight.mul_(1 - group["lr"] * group["decay"])
                    weight.add_(step, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers at `lr`, AdamW for embedding and norms at lr / 5."""
    params = dict(model.named_parameters())
    matrices = [p for name, p in params.items() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in params.items() if p.dim() != 2 or "embed" in name]
    adamw = torch.optim.AdamW(others, lr=lr / 5, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, lr), adamw]
