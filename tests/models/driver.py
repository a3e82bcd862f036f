"""A small runtime for tests: pages and rows shuffled, any mix of chunks and decodes in a step."""

from dataclasses import dataclass, field
from itertools import chain

import torch

from minisgl.layers.attention import ForwardInputs
from minisgl.models.decoder import Decoder


@dataclass
class Paged:
    """KV of a few sequences in shuffled pages of a pool that starts out poisoned."""

    decoder: Decoder
    num_sequences: int
    capacity: int  # tokens per sequence
    page_size: int = 4
    seed: int = 0
    dtype: torch.dtype = torch.float32
    lengths: list[int] = field(init=False)

    def __post_init__(self) -> None:
        config = self.decoder.config
        generator = torch.Generator().manual_seed(self.seed)
        per_sequence = -(-self.capacity // self.page_size)
        num_pages = per_sequence * self.num_sequences + 3
        shape = (num_pages * self.page_size, self.decoder.num_kv_heads, config.head_dim)
        self.kv = [
            (torch.full(shape, 1e4, dtype=self.dtype), torch.full(shape, 1e4, dtype=self.dtype))
            for _ in range(config.num_layers)
        ]
        self.rows = torch.randperm(self.num_sequences + 2, generator=generator).int()
        self.page_table = torch.full(
            (self.num_sequences + 2, per_sequence + 1), 10**6, dtype=torch.int32
        )
        pages = torch.randperm(num_pages, generator=generator).int()
        for s in range(self.num_sequences):
            own = pages[s * per_sequence : (s + 1) * per_sequence]
            self.page_table[self.rows[s], :per_sequence] = own
        self.lengths = [0] * self.num_sequences

    def step(self, work: dict[int, list[int]], num_decode: int = 0) -> list[torch.Tensor]:
        """Compute each sequence's new tokens, the first `num_decode` of them as decodes.

        Returns logits [n, vocab] per sequence, in the order of `work`.
        """
        sequences = list(work)
        counts = [len(tokens) for tokens in work.values()]
        positions, slots = [], []
        for s, tokens in work.items():
            for position in range(self.lengths[s], self.lengths[s] + len(tokens)):
                page = int(self.page_table[self.rows[s], position // self.page_size])
                positions.append(position)
                slots.append(page * self.page_size + position % self.page_size)
            self.lengths[s] += len(tokens)
        inputs = ForwardInputs(
            input_ids=torch.tensor(list(chain(*work.values())), dtype=torch.int32),
            positions=torch.tensor(positions),
            cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0).int(),
            seq_lens=torch.tensor([self.lengths[s] for s in sequences], dtype=torch.int32),
            rows=self.rows[sequences],
            page_table=self.page_table,
            slot_mapping=torch.tensor(slots),
            kv=self.kv,
            page_size=self.page_size,
            num_decode=num_decode,
            decode_width=counts[0] if num_decode else 1,
            max_seqlen_q=max(counts[num_decode:], default=1),
        )
        hidden = self.decoder.forward(inputs)
        return list(self.decoder.logits(hidden).split(counts))

    def prefill(self, prompts: dict[int, list[int]], chunk: int) -> list[torch.Tensor]:
        """Compute prompts in chunks of `chunk` tokens, all sequences in each step."""
        parts: dict[int, list[torch.Tensor]] = {s: [] for s in prompts}
        for start in range(0, max(map(len, prompts.values())), chunk):
            work = {s: p[start : start + chunk] for s, p in prompts.items() if start < len(p)}
            for s, logits in zip(work, self.step(work), strict=True):
                parts[s].append(logits)
        return [torch.cat(logits) for logits in parts.values()]
