"""A step's inputs made from the state of each row on the device, its points, and that state updated
after it.

A row holds its last sampled token and `lengths`, the position where that token stands (all before
it are computed). A chunk whose tokens the host has not read starts there, so a step can be planned
and launched before the one before it is read.

`prepare_inputs`, before the forward pass, for token t, the i-th of sequence s:
    start_s = starts[s], or lengths[rows[s]] where that is -1
    position_t = start_s + i;  slot_t = page_table[rows[s], position // page_size] * page_size
                                        + position % page_size, or -1 for padding
`prepare_points`, where every token of a step is sampled behind, for token i of a sequence:
    the drafts before the point are the sequence's own among its tokens 1 .. i
`accept_and_advance`, after sampling, for a sequence with drafts d_1 .. d_k and samples s_0 .. s_k:
    accepted = the longest run with d_j = s_{j - 1};  the row's last token is s_accepted
A draft is right exactly when it is what the target samples there, so the output is the target's
own whatever the drafts (the coupling of speculative decoding with shared noise).
"""

from typing import Any

import torch

from minisgl.kernels.op import Case, Cost, Implementation, Op


def prepare_inputs_reference(
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
    """Fill input_ids [T] int32, positions [T] and slot_mapping [T] int64, seq_lens [S] int32.

    token_ids: [T] int32, -1 = the row's last token. sequences: [T] int32, each token's sequence.
    offsets: [S + 1] int32, where each sequence's tokens begin. rows, starts, num_tokens: [S] int32;
    num_tokens counts the sequence's own tokens, those after it are padding (slot -1), and a
    sequence with none is padding altogether (seq_lens 0). last, lengths: [R] int32. page_table:
    [R, P] int32. A sequence's length covers its padding, so that queries keep their places.
    """
    s, r = sequences.long(), rows.long()
    begin = torch.where(starts < 0, lengths[r], starts)
    index = torch.arange(s.shape[0], device=s.device) - offsets[s]
    row = r[s]
    torch.where(token_ids < 0, last[row], token_ids, out=input_ids)
    torch.add(begin[s], index, out=positions)
    page = page_table[row, (positions // page_size).clamp(max=page_table.shape[1] - 1)]
    slots = page.long() * page_size + positions % page_size
    slot_mapping.copy_(torch.where(index < num_tokens[s], slots, -1))
    seq_lens.copy_(torch.where(num_tokens > 0, begin + offsets.diff(), 0))


def prepare_points_reference(
    ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, num_tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """For M sequences of 1 + K tokens each, N in all, of which num_tokens [M] int32 are their own.

    ids: [N] int32. positions: [N] int64. rows: [M] int32. Returns each point's row [N] int32 and
    the position behind it [N] int64; the sequences' drafts [M, K] int32, -1 after their own; and of
    those the ones before each point [N, K] int32, else -1.
    """
    count = len(rows)
    width = len(ids) // count
    of_points = rows[:, None].expand(count, width).reshape(-1)
    if width == 1:
        none = rows.new_empty((count, 0))
        return of_points, positions + 1, none, none
    nth = torch.ones_like(ids[1:width]).cumsum(0)  # without memory an arange takes seconds
    drafts = torch.where(nth < num_tokens[:, None], ids.view(count, width)[:, 1:], -1)
    every = (drafts + 1)[:, None].expand(count, width, width - 1)
    return of_points, positions + 1, drafts, (every.tril(-1) - 1).flatten(0, 1)


def accept_and_advance_reference(
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
    """Update rows by what was sampled; returns how many drafts each accepted, [M] int32.

    tokens: [N] int32 samples, sequence m's from index first[m] on. rows: [M] int32, distinct.
    drafts: [M, K] int32, -1 after a sequence's own. positions: [N] int64, where each sample stands.
    In place: last and lengths [R] int32; counts [R, V] int32, one more per new token in rows where
    counted [R] int32 is not 0; where ids [N] int32 are given, the tokens that were sampled behind,
    previous [R] int32, the token before the last one.
    """
    r, begin = rows.long(), first.long()
    k = drafts.shape[1]
    steps = begin[:, None] + torch.arange(k, device=tokens.device)
    right = (tokens[steps.clamp(max=tokens.shape[0] - 1)] == drafts) & (drafts >= 0)
    accepted = right.int().cumprod(1).sum(1)
    final = begin + accepted
    last[r] = tokens[final]
    if ids is not None and previous is not None:
        previous[r] = ids[final]
    lengths[r] = positions[final].int()
    one = (counted[r] != 0).int()
    for j in range(k + 1):
        token = tokens[(begin + j).clamp(max=tokens.shape[0] - 1)].long()
        counts[r, token] += one * (j <= accepted)
    return accepted.int()


def _points_cost(ids: torch.Tensor, rows: torch.Tensor, **_: Any) -> Cost:
    return Cost(bytes=ids.numel() * (24 + 4 * len(ids) // len(rows)), flops=ids.numel() * 2)


def _prepare_cost(token_ids: torch.Tensor, **_: Any) -> Cost:
    return Cost(bytes=token_ids.numel() * 40, flops=token_ids.numel() * 8)


def _advance_cost(tokens: torch.Tensor, rows: torch.Tensor, **_: Any) -> Cost:
    return Cost(bytes=tokens.numel() * 16 + rows.numel() * 16, flops=tokens.numel())


def _prepare_case(label: str, widths: list[int], padded: int, page_size: int) -> Case:
    """`widths` tokens per sequence; every third sequence's last token is padding, if it has two."""

    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        on = generator.device
        count = len(widths) + padded
        width = torch.tensor([*widths, *[1] * padded])
        num_tokens = width.clone()
        num_tokens[::3] -= (width[::3] > 1).long()
        num_tokens[len(widths) :] = 0
        offsets = torch.cat([torch.zeros(1, dtype=torch.long), width.cumsum(0)])
        total, table_rows, pages = int(offsets[-1]), count + 4, 12
        lengths = torch.randint(0, 90 // 2, (table_rows,), generator=generator, device=on)
        starts = torch.randint(0, 90 // 2, (count,), generator=generator, device=on)
        starts[::2] = -1
        token_ids = torch.randint(0, 99, (total,), generator=generator, device=on)
        token_ids[offsets[:-1][::2]] = -1
        page_size_pages = torch.randperm(table_rows * pages, generator=generator, device=on)
        ints = {
            "token_ids": token_ids,
            "sequences": torch.arange(count).repeat_interleave(width),
            "offsets": offsets,
            "rows": torch.randperm(table_rows, generator=generator, device=on)[:count],
            "starts": starts,
            "num_tokens": num_tokens,
            "last": torch.randint(0, 99, (table_rows,), generator=generator, device=on),
            "lengths": lengths,
            "page_table": page_size_pages.view(table_rows, pages),
        }
        outputs = {
            "input_ids": torch.full((total,), -7, dtype=torch.int32, device=device),
            "positions": torch.full((total,), -7, dtype=torch.int64, device=device),
            "slot_mapping": torch.full((total,), -7, dtype=torch.int64, device=device),
            "seq_lens": torch.full((count,), -7, dtype=torch.int32, device=device),
        }
        moved = {name: tensor.to(device, torch.int32) for name, tensor in ints.items()}
        return outputs | moved | {"page_size": page_size}

    return Case(label, make)


def _points_case(label: str, num_tokens: list[int], width: int) -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        on, count = generator.device, len(num_tokens)
        ids = torch.randint(0, 99, (count * width,), generator=generator, device=on)
        positions = torch.randint(0, 99, (count * width,), generator=generator, device=on)
        rows = torch.randperm(count + 3, generator=generator, device=on)[:count]
        ints = {"ids": ids, "positions": positions, "rows": rows}
        ints["num_tokens"] = torch.tensor(num_tokens)
        kinds = {"positions": torch.int64}
        return {k: tensor.to(device, kinds.get(k, torch.int32)) for k, tensor in ints.items()}

    return Case(label, make)


def _advance_case(label: str, num_drafts: list[int], *, keeps: bool = False) -> Case:
    """Sequence m has num_drafts[m] drafts; a random run of them is what was sampled."""

    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        on = generator.device
        count, vocab, table_rows = len(num_drafts), 37, len(num_drafts) + 3
        points = torch.tensor(num_drafts) + 1
        first = points.cumsum(0) - points
        tokens = torch.randint(0, 4, (int(points.sum()),), generator=generator, device=on)
        drafts = torch.full((count, max(num_drafts)), -1)
        for m, k in enumerate(num_drafts):
            drafts[m, :k] = tokens[first[m] : first[m] + k]
            drafts[m, m % 3 : k] += (torch.arange(k - m % 3) % 2 == 1) if k > m % 3 else 0
        made = {
            "tokens": tokens,
            "first": first,
            "rows": torch.randperm(table_rows, generator=generator, device=on)[:count],
            "drafts": drafts,
            "positions": torch.randint(5, 900, tokens.shape, generator=generator, device=on),
            "last": torch.full((table_rows,), -7),
            "lengths": torch.full((table_rows,), -7),
            "counts": torch.randint(0, 3, (table_rows, vocab), generator=generator, device=on),
            "counted": torch.arange(table_rows) % 2,
        }
        if keeps:
            made["ids"] = torch.randint(9, 99, tokens.shape, generator=generator, device=on)
            made["previous"] = torch.full((table_rows,), -7)
        moved = {name: tensor.to(device, torch.int32) for name, tensor in made.items()}
        return moved | {"positions": moved["positions"].long()}

    return Case(label, make)


_CPU = "minisgl.kernels.advance.cpu:"
_TORCH = "minisgl.kernels.advance:"
_TRITON = "minisgl.kernels.advance.portable:"

prepare_inputs = Op(
    "prepare_inputs",
    prepare_inputs_reference,
    implementations=[
        Implementation("cpu", "cpu", _CPU + "prepare_inputs_cpu"),
        Implementation("portable", "cuda", _TRITON + "prepare_inputs_portable"),
        Implementation("torch", "cuda", _TORCH + "prepare_inputs_reference"),
    ],
    cases=(
        _prepare_case("decode", [1] * 7, 2, 16),
        _prepare_case("drafts", [3] * 5, 0, 16),
        _prepare_case("mixed-page1", [1, 1, 1, 2, 9], 3, 1),
        _prepare_case("prefill", [13, 1, 40], 1, 64),
    ),
    cost=_prepare_cost,
)
prepare_points = Op(
    "prepare_points",
    prepare_points_reference,
    implementations=[
        Implementation("cpu", "cpu", _CPU + "prepare_points_cpu"),
        Implementation("torch", "cuda", _TORCH + "prepare_points_reference"),
    ],
    cases=(
        _points_case("plain", [1, 1, 0, 1, 1], 1),
        _points_case("drafts", [4, 0, 1, 3, 2], 4),
    ),
    cost=_points_cost,
)
accept_and_advance = Op(
    "accept_and_advance",
    accept_and_advance_reference,
    implementations=[
        Implementation("cpu", "cpu", _CPU + "accept_and_advance_cpu"),
        Implementation("portable", "cuda", _TRITON + "accept_and_advance_portable"),
        Implementation("torch", "cuda", _TORCH + "accept_and_advance_reference"),
    ],
    cases=(
        _advance_case("plain", [0, 0, 0, 0, 0]),
        _advance_case("drafts", [3, 0, 1, 4, 2, 4]),
        _advance_case("previous", [0, 2, 1, 0], keeps=True),
    ),
    cost=_advance_cost,
)
