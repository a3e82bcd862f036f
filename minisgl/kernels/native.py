"""The CPU's native ops, csrc/cpu/model_ops.cpp: when they can be used.

They serve bf16 and fp32 with fp32 arithmetic. A call that they do not cover, or that comes before
they are built, is served by the reference, which computes the same.
"""

from types import ModuleType

import torch

from minisgl import csrc

DTYPES = (torch.bfloat16, torch.float32)


def model_ops(first: torch.Tensor, *others: torch.Tensor | None) -> ModuleType | None:
    """The native module, if it is built and all tensors are of one type that it has."""
    if first.dtype not in DTYPES:
        return None
    for tensor in others:
        if tensor is not None and tensor.dtype != first.dtype:
            return None
    return csrc.load("model_ops")


def address(tensor: torch.Tensor | None) -> int:
    """Where the first element is; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
