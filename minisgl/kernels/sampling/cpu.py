"""Sampling on CPU: csrc/cpu/logits.cpp and sampling.cpp, and the same in PyTorch and numpy.

Filters that are off cost nothing, and noise is computed only for tokens that can win. A CPU
implementation may look at its data: the one here reads parameters through numpy, splits rows into
greedy, filtered and plain ones, finds thresholds among the largest few values where those suffice,
and computes noise for the kept candidates alone. Results equal the reference's, to the rounding of
exp and log.
"""

import numpy as np
import torch

from minisgl import csrc
from minisgl.device.tape import by_call, empty
from minisgl.kernels.sampling import (
    PARAMS,
    SEEN_IN_PROMPT,
    cap_logits_reference,
    fixed_point,
    mask_logits_reference,
    top_k_threshold,
    top_p_threshold,
)
from minisgl.kernels.sampling.noise import gumbel, position_keys

FEW = 256  # values looked at first for a top-p threshold
BLOCK = 1 << 16  # elements of noise at once, so that they stay in cache


def cap_logits_cpu(logits: torch.Tensor, softcap: float) -> None:
    """See `cap_logits_reference`."""
    native = csrc.load("model_ops")
    if native is None or not logits.is_contiguous() or logits.dtype != torch.float32:
        cap_logits_twin(logits, softcap)
        return
    native.cap_logits(logits.data_ptr(), *logits.shape, softcap, torch.get_num_threads())


cap_logits_twin = by_call(cap_logits_reference)


def adjust_logits_cpu(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    params: torch.Tensor,
    bias_ids: torch.Tensor,
    bias_values: torch.Tensor,
    counts: torch.Tensor,
    drafts: torch.Tensor,
) -> None:
    """See `adjust_logits_reference`."""
    tensors = (logits, rows, positions, params, bias_ids, bias_values, counts, drafts)
    native = csrc.load("model_ops")
    fits = counts.shape[1] == logits.shape[1] and bias_ids.shape == bias_values.shape
    if native is None or not fits or not all(tensor.is_contiguous() for tensor in tensors):
        adjust_logits_twin(*tensors)
        return
    addresses = [tensor.data_ptr() for tensor in tensors]
    sizes = (*logits.shape, bias_ids.shape[1], drafts.shape[1], torch.get_num_threads())
    native.adjust_logits(*addresses, *sizes)


@by_call
def adjust_logits_twin(
    logits: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
    params: torch.Tensor,
    bias_ids: torch.Tensor,
    bias_values: torch.Tensor,
    counts: torch.Tensor,
    drafts: torch.Tensor,
) -> None:
    """The same without the native module."""
    r = rows.numpy()
    p = _records(params)[r]
    x = logits.numpy()
    for n in np.flatnonzero(p["needs_counts"]):
        _penalize(x[n], counts[int(r[n])].numpy(), drafts[n].numpy(), p[n])
    first = np.where(positions.numpy() < p["min_length"], 0, p["num_bans"])
    for n in np.flatnonzero(first < p["num_biases"]):
        entries = slice(first[n], p["num_biases"][n])
        np.add.at(x[n], bias_ids.numpy()[r[n], entries], bias_values.numpy()[r[n], entries])


def _penalize(x: np.ndarray, counts: np.ndarray, drafts: np.ndarray, p: np.void) -> None:
    """Penalties of one row x [V], in place, touching only the tokens seen."""
    ids = np.flatnonzero(counts)
    drafts = drafts[drafts >= 0]
    output = counts[ids] & (SEEN_IN_PROMPT - 1)
    if drafts.size:
        ids, position = np.unique(np.concatenate([ids, drafts]), return_inverse=True)
        extra = np.bincount(position[-drafts.size :], minlength=ids.size).astype(np.int32)
        output = (counts[ids] & (SEEN_IN_PROMPT - 1)) + extra
    y = x[ids]
    y = np.where(y > 0, y / p["repetition_penalty"], y * p["repetition_penalty"])
    times = output.astype(np.float32)
    x[ids] = y - p["frequency_penalty"] * times - p["presence_penalty"] * (times > 0)


def mask_logits_cpu(logits: torch.Tensor, indices: torch.Tensor, bits: torch.Tensor) -> None:
    """See `mask_logits_reference`."""
    tensors = (logits, indices, bits)
    native = csrc.load("model_ops")
    fits = bits.shape == (len(indices), -(-logits.shape[1] // 32))
    if native is None or not fits or not all(tensor.is_contiguous() for tensor in tensors):
        mask_logits_twin(*tensors)
        return
    addresses = [tensor.data_ptr() for tensor in tensors]
    native.mask_logits(*addresses, len(bits), logits.shape[1], torch.get_num_threads())


mask_logits_twin = by_call(mask_logits_reference)


def sample_cpu(
    logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, params: torch.Tensor
) -> torch.Tensor:
    native = csrc.load("model_ops")
    if native is None:
        return sample_twin(logits, rows, positions, params)
    logits, positions = logits.contiguous(), positions.contiguous()
    tokens = empty(logits.shape[:1], torch.int32)
    tensors = (rows, positions, params, tokens)
    addresses = [tensor.data_ptr() for tensor in tensors]
    native.sample(logits.data_ptr(), *logits.shape, *addresses, torch.get_num_threads())
    return tokens


@by_call
def sample_twin(
    logits: torch.Tensor, rows: torch.Tensor, positions: torch.Tensor, params: torch.Tensor
) -> torch.Tensor:
    """The same without the native module."""
    p = _records(params)[rows.numpy()]
    vocab = logits.shape[1]
    greedy = p["temperature"] == 0
    tokens = np.zeros(len(p), np.int32)
    if greedy.all():
        tokens[:] = logits.numpy().argmax(1)
        return torch.from_numpy(tokens)
    for i in np.flatnonzero(greedy):
        tokens[i] = logits[i].numpy().argmax()
    filtered = ((p["top_k"] > 0) & (p["top_k"] < vocab)) | (p["top_p"] < 1) | (p["min_p"] > 0)
    low, high = position_keys(torch.from_numpy(p["key"].copy()), positions)
    step = max(1, BLOCK // vocab)
    for is_group, draw in ((~greedy & ~filtered, _draw_all), (~greedy & filtered, _draw_kept)):
        members = np.flatnonzero(is_group)
        for start in range(0, len(members), step):
            n = members[start : start + step]
            index = torch.from_numpy(n)
            z = logits[index] / torch.from_numpy(p["temperature"][n])[:, None]
            tokens[n] = draw(z, low[index], high[index], p[n])
    return torch.from_numpy(tokens)


def _draw_all(z: torch.Tensor, low: torch.Tensor, high: torch.Tensor, p: np.ndarray) -> np.ndarray:
    ids = torch.arange(z.shape[1], dtype=torch.int32)
    z += gumbel(low[:, None], high[:, None], ids)
    best: np.ndarray = z.numpy().argmax(1)
    return best


def _draw_kept(z: torch.Tensor, low: torch.Tensor, high: torch.Tensor, p: np.ndarray) -> np.ndarray:
    row, column = _keep(z, p).nonzero(as_tuple=True)
    scores = (z[row, column] + gumbel(low[row], high[row], column.int())).numpy()
    rows, ids = row.numpy(), column.numpy()
    present, first = np.unique(rows, return_index=True)
    best = np.full(len(p), -np.inf, np.float32)
    best[present] = np.maximum.reduceat(scores, first) if len(scores) else ()
    winners = np.flatnonzero(scores == best[rows])[::-1]  # the lowest id is written last
    tokens = np.zeros(len(p), np.int64)
    tokens[rows[winners]] = ids[winners]
    return tokens


def _keep(z: torch.Tensor, p: np.ndarray) -> torch.Tensor:
    """Which values of z [N, V] pass their row's filters."""
    vocab = z.shape[1]
    top_k, top_p, min_p = (torch.from_numpy(p[name].copy()) for name in ("top_k", "top_p", "min_p"))
    top_k = torch.where(top_k >= vocab, 0, top_k)
    few = min(vocab, max(int(top_k.max()), FEW if (p["top_p"] < 1).any() else 1))
    largest = z.topk(few, dim=1).values
    kept = z >= top_k_threshold(largest, top_k)[:, None]
    weights: torch.Tensor | None = None
    if (p["top_p"] < 1).any():
        weights = (z - largest[:, :1]).exp()
        mass = (fixed_point(weights) * kept).sum(1)
        threshold = top_p_threshold(largest, mass, top_p)
        # Where the few values end above the threshold sought, look at all of them.
        short = (threshold == largest[:, -1]) & (top_k == 0) & (top_p < 1)
        for n in short.nonzero().flatten().tolist() if few < vocab else ():
            ordered = z[n : n + 1].sort(dim=1, descending=True).values
            threshold[n] = top_p_threshold(ordered, mass[n : n + 1], top_p[n : n + 1])[0]
        kept &= z >= threshold[:, None]
    if (p["min_p"] > 0).any():
        weights = (z - largest[:, :1]).exp() if weights is None else weights
        kept &= weights >= min_p[:, None]
    return kept


def _records(params: torch.Tensor) -> np.ndarray:
    return params.numpy().view(PARAMS)[:, 0]
