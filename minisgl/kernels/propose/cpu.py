"""Around a draft model's passes on CPU: native, or the reference until that is built."""

import torch

from minisgl import csrc
from minisgl.device.tape import by_call, empty
from minisgl.kernels.propose import keep_proposals_reference, prepare_proposals_reference

prepare_proposals_twin = by_call(prepare_proposals_reference)
keep_proposals_twin = by_call(keep_proposals_reference)


def prepare_proposals_cpu(
    asked: torch.Tensor,
    drafted: torch.Tensor,
    nth: torch.Tensor,
    last: torch.Tensor,
    previous: torch.Tensor,
    lengths: torch.Tensor,
    width: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `prepare_proposals_reference`."""
    native = csrc.load("model_ops")
    tensors = (asked, drafted, nth, last, previous, lengths)
    if native is None or not all(tensor.is_contiguous() for tensor in tensors):
        return prepare_proposals_twin(*tensors, width)
    size, num_drafts = drafted.shape
    ids = empty((size * width,), torch.int32)
    starts, num_tokens = (empty((size,), torch.int32) for _ in range(2))
    positions = empty((size,), torch.int64)
    found = ids, starts, num_tokens, positions
    addresses = (tensor.data_ptr() for tensor in (*tensors, *found))
    native.prepare_proposals(*addresses, size, num_drafts, width)
    return found


def keep_proposals_cpu(tokens: torch.Tensor, drafted: torch.Tensor, nth: torch.Tensor) -> None:
    """See `keep_proposals_reference`."""
    native = csrc.load("model_ops")
    if native is None or not (tokens.is_contiguous() and drafted.is_contiguous()):
        keep_proposals_twin(tokens, drafted, nth)
        return
    addresses = (tensor.data_ptr() for tensor in (tokens, drafted, nth))
    native.keep_proposals(*addresses, *drafted.shape)
