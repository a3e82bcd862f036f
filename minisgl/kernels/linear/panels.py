"""The form in which a CPU's native product reads bf16 weights fastest: panels of 32 rows."""

from typing import NamedTuple

import torch

from minisgl import csrc

WIDTH = 32
LARGE = 8 * 2**20  # bytes that are too many to unpack in every step, as until the build has ended
_AT_ONCE = 64  # panels that are packed together: what packing takes besides


class Panels(NamedTuple):
    """Weights [..., N, K]: 32 rows side by side in pairs of K, the last panel with any padding.

    So one product of pairs (x[k], x[k + 1]) makes sixteen columns, and a panel lies in memory in
    the order in which it is read.
    """

    values: torch.Tensor  # [..., ceil(N / 32), K / 2, 32, 2]
    num_rows: int  # N

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (self.values,)

    @property
    def shape(self) -> tuple[int, ...]:
        return *self.values.shape[:-4], self.num_rows, 2 * self.values.shape[-3]


Dense = torch.Tensor | Panels  # the weight [N, K] of a product, in floats


def packed(weight: torch.Tensor) -> Dense:
    """Weights [..., N, K] in the form that products on their device read fastest.

    That is itself but on a CPU that has the native product, or is about to: a large weight waits
    for its build, a small one does not. Panels are made in the place of the weight, which is then
    gone, where its rows are whole panels.
    """
    *others, n, k = weight.shape
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or k % 2 or n == 0:
        return weight
    native = csrc.load("model_ops", wait=weight.nbytes > LARGE)
    if native is None and not csrc.is_coming("model_ops"):
        return weight
    if n % WIDTH or not weight.is_contiguous():
        padded = weight.new_zeros(*others, -(-n // WIDTH) * WIDTH, k)
        padded[..., :n, :] = weight
        weight = padded
    values = weight.view(*others, -1, k // 2, WIDTH, 2)
    pairs = values.view(torch.int32).view(-1, k // 2, WIDTH)  # [panels, K / 2, 32]
    for some in pairs.split(_AT_ONCE):
        some.copy_(some.reshape(-1, WIDTH, k // 2).transpose(1, 2).contiguous())
    return Panels(values, n)


def unpacked(weight: Dense) -> torch.Tensor:
    """The weights [..., N, K], copied out of their panels if they are packed."""
    if not isinstance(weight, Panels):
        return weight
    *others, n, k = weight.shape
    return weight.values.transpose(-3, -2).reshape(*others, -1, k)[..., :n, :]
