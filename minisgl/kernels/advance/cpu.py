"""Row state on CPU: native, or the reference until that is built."""

import torch

from minisgl import csrc
from minisgl.device.tape import by_call, empty
from minisgl.kernels.advance import (
    accept_and_advance_reference,
    prepare_inputs_reference,
    prepare_points_reference,
)
from minisgl.kernels.native import address

prepare_inputs_twin = by_call(prepare_inputs_reference)
prepare_points_twin = by_call(prepare_points_reference)
accept_and_advance_twin = by_call(accept_and_advance_reference)


def prepare_inputs_cpu(
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    seq_lens: torch.Tensor,
    token_ids: torch.Tensor,
    sequences: torch.Tensor,
    offsets: torch.Tensor,
    rows: torch.Tensor,
    starts: torch.Tensor,
    num_tokens: torch.Tensor,
    last: torch.Tensor,
    lengths: torch.Tensor,
    page_table: torch.Tensor,
    page_size: int,
) -> None:
    """See `prepare_inputs_reference`."""
    written = (input_ids, positions, slot_mapping, seq_lens)
    sequences = sequences.contiguous()  # of one sequence it may be a number expanded
    read = (token_ids, sequences, offsets, rows, starts, num_tokens, last, lengths, page_table)
    native = csrc.load("model_ops")
    if native is None or not all(tensor.is_contiguous() for tensor in (*written, *read)):
        return prepare_inputs_twin(*written, *read, page_size)
    addresses = (tensor.data_ptr() for tensor in (*written, *read))
    sizes = (len(sequences), len(rows), page_table.shape[1], page_size)
    native.prepare_inputs(*addresses, *sizes)
    return None


def prepare_points_cpu(
    ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, num_tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `prepare_points_reference`."""
    tensors = (ids, positions, rows, num_tokens)
    native = csrc.load("model_ops")
    if native is None or not all(tensor.is_contiguous() for tensor in tensors):
        return prepare_points_twin(*tensors)
    points, count = len(ids), len(rows)
    width = points // count
    of_points, following = empty((points,), torch.int32), empty((points,), torch.int64)
    drafts, before = (empty((n, width - 1), torch.int32) for n in (count, points))
    found = of_points, following, drafts, before
    native.prepare_points(*(t.data_ptr() for t in (*tensors, *found)), count, width)
    return found


def accept_and_advance_cpu(
    tokens: torch.Tensor,
    first: torch.Tensor,
    rows: torch.Tensor,
    drafts: torch.Tensor,
    positions: torch.Tensor,
    last: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    counted: torch.Tensor,
    ids: torch.Tensor | None = None,
    previous: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `accept_and_advance_reference`."""
    tensors = (tokens, first, rows, drafts, positions, last, lengths, counts, counted)
    native = csrc.load("model_ops")
    kept = () if ids is None or previous is None else (ids, previous)
    if native is None or not all(tensor.is_contiguous() for tensor in (*tensors, *kept)):
        return accept_and_advance_twin(*tensors, ids, previous)
    accepted = empty((len(rows),), torch.int32)
    addresses = map(address, (*tensors, *(kept or (None, None)), accepted))
    native.accept_and_advance(*addresses, len(tokens), *drafts.shape, counts.shape[1])
    return accepted
