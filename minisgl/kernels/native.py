"""When the CPU's native ops, csrc/cpu, can be used.

They take bf16 and fp32 and compute in fp32. A call that they do not take, or that comes before
they are built, is computed by the reference instead.
"""

from types import ModuleType

import torch

from minisgl import csrc

NATIVE_DTYPES = (torch.bfloat16, torch.float32)


def model_ops(first: torch.Tensor, *others: torch.Tensor | None) -> ModuleType | None:
    """The native module, if it is built and all tensors are of one type that it has."""
    if first.dtype not in NATIVE_DTYPES:
        return None
    for tensor in others:
        if tensor is not None and tensor.dtype != first.dtype:
            return None
    return csrc.load("model_ops")


def address(tensor: torch.Tensor | None) -> int:
    """The address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
