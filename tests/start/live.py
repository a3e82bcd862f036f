"""The most bytes that a call has in tensors at one time."""

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make and somebody holds."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.most = 0
        self._known = set[int]()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known | given:
                self._known.add(storage._cdata)
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
                self.bytes += storage.nbytes()
        self.most = max(self.most, self.bytes)
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def most_live(call: Callable[[], object]) -> int:
    with Live() as live:
        call()
    return live.most
