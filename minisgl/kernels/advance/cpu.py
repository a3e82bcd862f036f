"""Row state on CPU, through numpy, whose calls on such small arrays take less time than torch's."""

import numpy as np
import torch


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
    s, r, ids = sequences.numpy(), rows.numpy(), token_ids.numpy()
    begin, own, ends = starts.numpy(), num_tokens.numpy(), offsets.numpy()
    begin = np.where(begin < 0, lengths.numpy()[r], begin)
    index = np.arange(len(s)) - ends[s]
    row, table = r[s], page_table.numpy()
    np.copyto(input_ids.numpy(), np.where(ids < 0, last.numpy()[row], ids))
    position = positions.numpy()
    np.add(begin[s], index, out=position)
    page = position // page_size
    slots = table[row, np.minimum(page, table.shape[1] - 1)] * page_size
    slots += position - page * page_size
    np.copyto(slot_mapping.numpy(), np.where(index < own[s], slots, -1))
    np.copyto(seq_lens.numpy(), np.where(own > 0, begin + np.diff(ends), 0))


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
) -> torch.Tensor:
    r, begin, new = rows.numpy(), first.numpy(), tokens.numpy()
    accepted = np.zeros(len(r), np.int32)
    if drafts.shape[1]:
        drafted = drafts.numpy()
        steps = np.minimum(begin[:, None] + np.arange(drafted.shape[1]), len(new) - 1)
        right = (new[steps] == drafted) & (drafted >= 0)
        right.cumprod(1).sum(1, out=accepted)
    final = begin + accepted
    last.numpy()[r] = new[final]
    lengths.numpy()[r] = positions.numpy()[final]
    for m in np.flatnonzero(counted.numpy()[r]):
        np.add.at(counts.numpy()[r[m]], new[begin[m] : final[m] + 1], 1)
    return torch.from_numpy(accepted)
