"""The KV pool: keys and values of every layer, in pages."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minisgl.device import Device
from minisgl.kernels.kv_copy import copy_pages
from minisgl.layers.attention import KV


@dataclass(frozen=True)
class KVShape:
    """What one token's keys and values take."""

    num_layers: int
    num_kv_heads: int  # of this rank
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


AHEAD = 4096  # tokens whose memory is committed before they come


class KVPool:
    """Keys and values of every layer in one tensor [L, 2, slots, Hkv, D]; called in the stream."""

    def __init__(self, device: Device, shape: KVShape, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        slots = num_pages * page_size
        self.storage = device.zeros(
            (shape.num_layers, 2, slots, shape.num_kv_heads, shape.head_dim), shape.dtype
        )
        self.layers: Sequence[KV] = [(layer[0], layer[1]) for layer in self.storage]
        self._device = device
        self._committed = 0  # slots, or soon
        self.use(0)

    def use(self, page: int) -> None:
        """A step is about to use this page. Pages are handed out from the first one on, so what
        follows those in use is next, and a prompt need not wait for its memory then."""
        end = min((page + 1) * self.page_size + AHEAD, self.storage.shape[2])
        if end - self._committed >= AHEAD // 2:
            parts = self.storage[:, :, self._committed : end].flatten(0, 1)
            self._device.commit_soon(list(parts))
            self._committed = end

    def copy(self, jobs: torch.Tensor) -> None:
        """Run copy jobs [J, 3] int32 of (source page, target page, tokens), in every layer."""
        copy_pages(self.storage, jobs, self.page_size)
