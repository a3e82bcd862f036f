"""From logits to tokens: penalties, masks and the draw, at the vocabulary of Qwen3."""

from collections.abc import Iterator

import torch

from benchmarks.kernels import baselines
from benchmarks.kernels.workload import Arguments, Setting, Workload
from minisgl.kernels.logprobs import logprobs
from minisgl.kernels.sampling import (
    SEEN_IN_PROMPT,
    adjust_logits,
    cap_logits,
    make_params,
    mask_logits,
    sample,
)

FILTERS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    # Of 152k normal logits 50 % of the mass is within some tens of tokens, 90 % within a thousand
    # and more, which is beyond what the kernel gathers.
    "top-p, few tokens": {"temperature": 0.8, "top_p": 0.5},
    "top-p": {"temperature": 0.8, "top_p": 0.9},
    "top-k top-p": {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    "min-p": {"temperature": 0.8, "min_p": 0.05},
}


def samples(small: bool) -> Iterator[Workload]:
    for rows, vocab in ((4, 4096),) if small else ((256, 152064), (8, 152064)):
        for name, fields in FILTERS.items():

            def make(
                setting: Setting,
                fields: dict[str, float] = fields,
                rows: int = rows,
                vocab: int = vocab,
            ) -> Arguments:
                return _drawn(setting, rows, vocab, fields)

            yield Workload(
                sample,
                f"{rows} x {vocab} {name}",
                make,
                baselines.sampling(fields),
                {"rows": rows, "filter": name},
                num_bytes=rows * vocab * 4,
                goal_rivals=None if rows == 8 else (),
            )


def _drawn(setting: Setting, rows: int, vocab: int, fields: dict[str, float]) -> Arguments:
    return {
        "logits": setting.normal(rows, vocab, scale=3.0, dtype=torch.float32),
        "rows": torch.arange(rows, dtype=torch.int32, device=setting.device),
        "positions": torch.arange(rows, device=setting.device) + 100,
        "params": make_params(rows, **fields).to(setting.device),
    }


def logits(small: bool) -> Iterator[Workload]:
    rows, vocab = (4, 4096) if small else (256, 151936)

    def adjust(setting: Setting) -> Arguments:
        fields = {
            "presence_penalty": 0.5,
            "repetition_penalty": 1.2,
            "needs_counts": 1.0,
            "num_biases": 64.0,
        }
        seen = setting.integers(0, 2, rows, vocab)
        return _drawn(setting, rows, vocab, fields) | {
            "bias_ids": torch.stack([setting.order(vocab)[:64].int() for _ in range(rows)]),
            "bias_values": setting.normal(rows, 64, dtype=torch.float32),
            "counts": seen + SEEN_IN_PROMPT * setting.integers(0, 2, rows, vocab),
            "drafts": setting.integers(0, vocab, rows, 0),
        }

    def mask(setting: Setting) -> Arguments:
        words = -(-vocab // 32)
        return {
            "logits": setting.normal(rows, vocab, dtype=torch.float32),
            "indices": setting.order(rows).int(),
            "bits": setting.integers(0, 2**31 - 1, rows, words),
        }

    def cap(setting: Setting) -> Arguments:
        values = setting.normal(rows, vocab, scale=20.0, dtype=torch.float32)
        return {"logits": values, "softcap": 30.0}

    def score(setting: Setting) -> Arguments:
        return {
            "logits": setting.normal(rows, vocab, dtype=torch.float32),
            "token_ids": setting.integers(0, vocab, rows),
            "num_top": 5,
        }

    label = f"{rows} x {vocab}"
    yield Workload(logprobs, label, score, {}, {"rows": rows})
    yield Workload(cap_logits, label, cap, {}, {"rows": rows})
    yield Workload(adjust_logits, label, adjust, {}, {"rows": rows})
    yield Workload(mask_logits, label, mask, baselines.MASK, {"rows": rows})
