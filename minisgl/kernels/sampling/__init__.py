"""From logits to tokens: caps, penalties and biases, grammar masks, filters and the draw itself.

With logits x of one row, in this order:

    of models that cap them           x = softcap * tanh(x / softcap)
    seen tokens (prompt or output)    x = x / r if x > 0 else x * r             repetition
    output tokens, c times so far     x = x - frequency * c - presence          penalties
    listed tokens                     x = x + bias;  x = -inf while banned      bias, min_tokens
    tokens a grammar forbids          x = -inf
    temperature T = 0                 the lowest id of the largest x            greedy
    otherwise z = x / T, and keep z_i only if
      top-k   z_i is at least the k-th largest z
      top-p   z_i >= t, the largest t with mass{z >= t} >= p * mass{kept by top-k}
      min-p   exp(z_i - max z) >= min_p
    and take the lowest id of the largest z_i + g_i, g standard Gumbel noise.

The last line draws from softmax(z) over what is kept (Gumbel, 1954; Maddison et al., "A* Sampling",
2014) in one pass, without a sum. Every filter is a threshold on the value: equal logits stay or
go together, and no sorting order matters. Masses are fixed-point integers, floor(exp(z - max z) *
2^32), whose sums do not depend on their order. Noise is a function of (seed, choice, position,
vocabulary id), see `noise`. Sources: Keskar et al., "CTRL", 2019 (repetition); Holtzman et al.,
"The Curious Case of Neural Text Degeneration", 2020 (top-p); Nguyen et al., "Turning Up the Heat",
2024 (min-p).

Per-row parameters lie on the device in a table of records (`PARAMS`), indexed by row.
"""

import math
from typing import Any

import numpy as np
import torch

from minisgl.kernels.op import Case, Cost, Expected, Implementation, Op
from minisgl.kernels.sampling.noise import gumbel, position_keys, row_key

# One row's record, in 32-bit words; kernels read words at these offsets.
PARAMS = np.dtype(
    [
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("top_k", np.int32),  # 0 = off
        ("min_length", np.int32),  # bans hold for tokens at positions below it
        ("num_bans", np.int32),  # the first entries of the row's bias list
        ("num_biases", np.int32),  # all its entries, bans included
        ("key", np.int64),  # of the row's noise
        ("needs_counts", np.int32),
        ("unused", np.int32),
    ]
)
PARAM_WORDS = PARAMS.itemsize // 4
SEEN_IN_PROMPT = 2**30  # flag in a count; the bits below it count the output's tokens
MAX_BIASES = 1024  # entries of a row's bias list: logit_bias, stop ids and EOS ids together


def column(params: torch.Tensor, name: str) -> torch.Tensor:
    """Field `name` of the parameter table [R, PARAM_WORDS] int32, as a view [R]."""
    field_type, offset = PARAMS.fields[name][:2]  # type: ignore[index]
    if field_type == np.int64:
        return params.view(torch.int64)[:, offset // 8]
    return params.view(torch.float32 if field_type == np.float32 else torch.int32)[:, offset // 4]


def cap_logits_reference(logits: torch.Tensor, softcap: float) -> None:
    """x = softcap * tanh(x / softcap) in place; logits: [N, V] fp32."""
    torch.div(logits, softcap, out=logits).tanh_().mul_(softcap)


def adjust_logits_reference(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    params: torch.Tensor,
    bias_ids: torch.Tensor,
    bias_values: torch.Tensor,
    counts: torch.Tensor,
    drafts: torch.Tensor,
) -> None:
    """Apply penalties, biases and bans to `logits` [N, V] fp32, in place.

    rows: [N] int32, lines of params [R, PARAM_WORDS] int32, of the bias list bias_ids [R, A] int32
    and bias_values [R, A] fp32 (bans are -inf), and of counts [R, V] int32. positions: [N] int64,
    where the sampled tokens will stand. drafts: [N, K] int32, tokens before that position which
    the counts do not hold yet; -1 is none.
    """
    r = rows.long()
    output = (counts[r] & (SEEN_IN_PROMPT - 1)).to(torch.int32)
    for ids in drafts.long().unbind(1):
        output.scatter_add_(1, ids.clamp(min=0)[:, None], (ids >= 0).int()[:, None])
    seen = (output > 0) | (counts[r] >= SEEN_IN_PROMPT)
    repetition = column(params, "repetition_penalty")[r][:, None]
    x = torch.where(logits > 0, logits / repetition, logits * repetition)
    x = torch.where(seen, x, logits)
    x = x - column(params, "frequency_penalty")[r][:, None] * output
    x = x - column(params, "presence_penalty")[r][:, None] * (output > 0)
    x = torch.where(column(params, "needs_counts")[r][:, None] != 0, x, logits)
    entry = torch.arange(bias_ids.shape[1], device=logits.device)
    banned = (positions < column(params, "min_length")[r])[:, None]
    active = entry < column(params, "num_biases")[r][:, None]
    active &= banned | (entry >= column(params, "num_bans")[r][:, None])
    values = bias_values[r].masked_fill(~active, 0.0)
    logits.copy_(x.scatter_add(1, bias_ids[r].long().masked_fill(~active, 0), values))


def mask_logits_reference(logits: torch.Tensor, indices: torch.Tensor, bits: torch.Tensor) -> None:
    """Set logits[indices[i], v] to -inf where bit v of bits[i] is 0, in place.

    logits: [N, V] fp32; indices: [M] int32, distinct, or -1 to skip; bits: [M, ceil(V / 32)] int32,
    bit v of a row being bit v % 32 of word v // 32.
    """
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    forbidden = ((bits[:, :, None] >> shifts) & 1).flatten(1)[:, : logits.shape[1]] == 0
    forbidden &= (indices >= 0)[:, None]
    change = torch.zeros_like(forbidden, dtype=logits.dtype).masked_fill_(forbidden, -math.inf)
    logits.index_add_(0, indices.clamp(min=0), change)


def sample_reference(
    logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, params: torch.Tensor
) -> torch.Tensor:
    """Draw one token per row: [N] int32.

    logits: [N, V] fp32, adjusted and masked; -inf is never drawn while anything else is there.
    rows, positions and params are as `adjust_logits` has them.
    """
    r = rows.long()
    temperature = column(params, "temperature")[r][:, None]
    greedy = temperature == 0
    z = logits / torch.where(greedy, 1.0, temperature)
    ordered = z.sort(dim=1, descending=True).values
    kept = z >= top_k_threshold(ordered, column(params, "top_k")[r])[:, None]
    weights = (z - ordered[:, :1]).exp()
    top_p = column(params, "top_p")[r]
    kept &= z >= top_p_threshold(ordered, (fixed_point(weights) * kept).sum(1), top_p)[:, None]
    kept &= weights >= column(params, "min_p")[r][:, None]
    ids = torch.arange(logits.shape[1], dtype=torch.int32, device=logits.device)
    low, high = position_keys(column(params, "key")[r], positions)
    drawn = (z + gumbel(low[:, None], high[:, None], ids)).masked_fill(~kept, -math.inf)
    return torch.where(greedy, logits, drawn).argmax(dim=1).int()


def top_k_threshold(ordered: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """The k-th largest value of each row [N]; -inf where k is 0. ordered: [N, V] descending."""
    last = (top_k.long() - 1).clamp(0, ordered.shape[1] - 1)
    threshold = ordered.gather(1, last[:, None]).squeeze(1)
    return threshold.masked_fill(top_k == 0, -math.inf)


def top_p_threshold(ordered: torch.Tensor, mass: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """The largest t [N] with mass{z >= t} >= top_p * mass; -inf where top_p is 1.

    ordered: [N, M] fp32, the M largest z, descending. mass: [N] int64, of what the filter sees. A
    row whose M values do not reach the mass gets the last of them.
    """
    cumulative = fixed_point((ordered - ordered[:, :1]).exp()).cumsum(1)
    short = cumulative.double() < (top_p.double() * mass.double())[:, None]
    last = short.sum(1).clamp(max=ordered.shape[1] - 1)
    threshold = ordered.gather(1, last[:, None]).squeeze(1)
    return threshold.masked_fill(top_p >= 1.0, -math.inf)


def fixed_point(weights: torch.Tensor) -> torch.Tensor:
    """Weights in [0, 1] as integers out of 2^32, whose sums do not depend on their order."""
    return (weights.double() * 2.0**32).long()


def _cap_cost(logits: torch.Tensor, **_: Any) -> Cost:
    return Cost(bytes=8 * logits.numel(), flops=8 * logits.numel())


def _adjust_cost(logits: torch.Tensor, **_: Any) -> Cost:
    return Cost(bytes=3 * logits.numel() * 4, flops=6 * logits.numel())


def _mask_cost(logits: torch.Tensor, bits: torch.Tensor, **_: Any) -> Cost:
    touched = bits.shape[0] * logits.shape[1]
    return Cost(bytes=8 * touched + bits.numel() * 4, flops=touched)


def _sample_cost(logits: torch.Tensor, **_: Any) -> Cost:
    return Cost(bytes=logits.numel() * 4, flops=30 * logits.numel())


def make_params(num_rows: int, **fields: Any) -> torch.Tensor:
    """A parameter table of neutral records, with columns set from `fields` (scalars or arrays)."""
    table = np.zeros(num_rows, PARAMS)
    table["temperature"] = table["top_p"] = table["repetition_penalty"] = 1.0
    table["key"] = [row_key(7, row) for row in range(num_rows)]
    for name, value in fields.items():
        table[name] = value
    return torch.from_numpy(table.view(np.int32).reshape(num_rows, PARAM_WORDS).copy())


def _rows_of(
    count: int, vocab: int, device: torch.device, generator: torch.Generator
) -> dict[str, Any]:
    on = generator.device
    logits = torch.randn(count, vocab, generator=generator, device=on) * 3
    rows = torch.randperm(count + 3, generator=generator, device=on)[:count].int()
    positions = torch.randint(1, 9000, (count,), generator=generator, device=on)
    made = {"logits": logits, "rows": rows, "positions": positions}
    return {name: tensor.to(device) for name, tensor in made.items()}


def _cap_case(label: str, count: int, vocab: int, softcap: float) -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        logits = _rows_of(count, vocab, device, generator)["logits"] * 20
        logits[0, :3] = torch.tensor([math.inf, -math.inf, math.nan])
        return {"logits": logits, "softcap": softcap}

    return Case(label, make)


def _sample_case(label: str, count: int, vocab: int, *, tied: bool = False, **fields: Any) -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        arguments = _rows_of(count, vocab, device, generator)
        if tied:  # many logits of a bf16 product are equal
            arguments["logits"] = arguments["logits"].bfloat16().float().round()
        arguments["logits"][:, 1::7] = -math.inf
        return arguments | {"params": make_params(count + 3, **fields).to(device)}

    return Case(label, make)


def _adjust_case(label: str, count: int, vocab: int, num_drafts: int) -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        arguments = _rows_of(count, vocab, device, generator)
        total, on = count + 3, generator.device

        def integers(low: int, high: int, *shape: int) -> torch.Tensor:
            made = torch.randint(low, high, shape, generator=generator, device=on)
            return made.to(device, torch.int32)

        bias_ids = torch.stack(
            [torch.randperm(vocab, generator=generator, device=on)[:8] for _ in range(total)]
        )
        bias_values = torch.randn(total, 8, generator=generator, device=on)
        bias_values[:, :2] = -math.inf
        fields = {
            "repetition_penalty": np.linspace(0.5, 2.0, total),
            "presence_penalty": np.linspace(-2.0, 2.0, total),
            "frequency_penalty": np.linspace(1.0, -1.0, total),
            "needs_counts": np.arange(total) % 4 != 0,
            "min_length": 4500,
            "num_bans": np.arange(total) % 3,
            "num_biases": np.arange(total) % 3 + np.arange(total) % 6,
        }
        flags = integers(0, 2, total, vocab) * SEEN_IN_PROMPT
        return arguments | {
            "params": make_params(total, **fields).to(device),
            "bias_ids": bias_ids.to(device, torch.int32),
            "bias_values": bias_values.to(device),
            "counts": integers(0, 3, total, vocab) + flags,
            "drafts": integers(-1, vocab, count, num_drafts),
        }

    return Case(label, make)


def _mask_case(label: str, count: int, vocab: int) -> Case:
    def make(
        device: torch.device, dtype: torch.dtype, generator: torch.Generator
    ) -> dict[str, Any]:
        logits = _rows_of(count, vocab, device, generator)["logits"]
        shape = (count, -(-vocab // 32))
        bits = torch.randint(-(2**31), 2**31, shape, generator=generator, device=generator.device)
        indices = torch.randperm(count, generator=generator, device=generator.device)
        indices[::3] = -1
        return {
            "logits": logits,
            "indices": indices.to(device, torch.int32),
            "bits": bits.to(device, torch.int32),
        }

    return Case(label, make)


_CPU = "minisgl.kernels.sampling.cpu:"
_TORCH = "minisgl.kernels.sampling:"
_TRITON = "minisgl.kernels.sampling."

cap_logits = Op(
    "cap_logits",
    cap_logits_reference,
    implementations=[
        Implementation("cpu", "cpu", _CPU + "cap_logits_cpu"),
        Implementation("torch", "cuda", _TORCH + "cap_logits_reference"),
    ],
    cases=(_cap_case("V64", 3, 64, 30.0), _cap_case("V131", 5, 131, 7.5)),
    cost=_cap_cost,
)
adjust_logits = Op(
    "adjust_logits",
    adjust_logits_reference,
    implementations=[
        Implementation("cpu", "cpu", _CPU + "adjust_logits_cpu"),
        Implementation("portable", "cuda", _TRITON + "logits:adjust_logits_portable"),
        Implementation("torch", "cuda", _TORCH + "adjust_logits_reference"),
    ],
    cases=(_adjust_case("plain", 5, 130, 0), _adjust_case("drafts", 3, 257, 3)),
    cost=_adjust_cost,
)
mask_logits = Op(
    "mask_logits",
    mask_logits_reference,
    implementations=[
        Implementation("cpu", "cpu", _CPU + "mask_logits_cpu"),
        Implementation("portable", "cuda", _TRITON + "logits:mask_logits_portable"),
        Implementation("torch", "cuda", _TORCH + "mask_logits_reference"),
    ],
    cases=(_mask_case("V64", 4, 64), _mask_case("V131", 7, 131)),
    cost=_mask_cost,
)
sample = Op(
    "sample",
    sample_reference,
    implementations=[
        Implementation("cpu", "cpu", _CPU + "sample_cpu"),
        Implementation("portable", "cuda", _TRITON + "portable:sample_portable"),
        Implementation("torch", "cuda", _TORCH + "sample_reference"),
    ],
    cases=(
        _sample_case("greedy", 5, 131, temperature=0.0),
        _sample_case("greedy-tied", 5, 131, tied=True, temperature=0.0),
        _sample_case("plain", 7, 257, temperature=np.linspace(0.2, 2.0, 10)),
        _sample_case("top-k", 6, 200, top_k=np.arange(9) * 40),
        _sample_case("top-k-tied", 6, 200, tied=True, top_k=np.arange(9) * 5),
        _sample_case("top-p", 6, 300, top_p=np.linspace(0.05, 1.0, 9)),
        _sample_case("min-p", 6, 129, min_p=np.linspace(0.0, 1.0, 9)),
        _sample_case(
            "mixed",
            9,
            500,
            tied=True,
            temperature=np.tile([0.0, 0.7, 1.3, 1.0], 3),
            top_k=np.tile([0, 3, 90], 4),
            top_p=np.tile([1.0, 0.8, 0.3, 0.99], 3),
            min_p=np.tile([0.0, 0.0, 0.02], 4),
        ),
    ),
    cost=_sample_cost,
    expected=[
        Expected(kernel, ("load128",), lambda facts: facts["V"] % 16 == 0)
        for kernel in ("scan_kernel", "collect_kernel", "refine_kernel", "regather_kernel")
    ],
)
