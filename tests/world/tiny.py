"""A tiny random Qwen3 behind a real executor, driven by the real scheduler, and its judge."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from minisgl.config import EngineConfig
from minisgl.core.batch import Batch, StepOutput
from minisgl.core.executor import GrammarMasks, Limits
from minisgl.core.request import Delta, Request, TokenLogprobs
from minisgl.core.scheduler import Scheduler
from minisgl.core.speculation import Speculation
from minisgl.device import CpuDevice
from minisgl.layers.attention import ForwardInputs
from minisgl.layers.weights import Placement
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.models.loader import load_model
from minisgl.step.draft import Draft
from minisgl.step.executor import LocalExecutor
from minisgl.step.kv_pool import KVShape
from minisgl.step.sizes import GraphSizes
from minisgl.step.worker import Worker
from tests.world import sampling
from tests.world.books import check_books
from tests.world.configs import QWEN3, VOCAB

EOS = (QWEN3["eos_token_id"],)
Masks = Callable[[Batch], GrammarMasks | None]


def tiny_decoder(dtype: torch.dtype = torch.float32, seed: int = 0, **other: int) -> Decoder:
    """`other`: what its config.json says otherwise."""
    config = ModelConfig.from_dict(QWEN3 | other)
    device = torch.device("cpu")
    return load_model(config, None, Placement(dtype, device), seed)


class TinyExecutor(LocalExecutor):
    """Shows its worker."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.worker = worker


def make_executor(
    model: Decoder | None = None,
    *,
    num_pages: int = 40,
    page_size: int = 16,
    max_rows: int = 8,
    max_context: int = 128,
    graphs: bool = True,
    graph_widths: Sequence[int] = (1,),
    graph_max_sequences: int = 256,
    most_in_pieces: int = 0,
    dtype: torch.dtype = torch.float32,
    draft: Decoder | None = None,
    draft_shape: KVShape | None = None,
    num_drafts: int = 3,
) -> TinyExecutor:
    model = model or tiny_decoder(dtype)
    limits = Limits(num_pages, page_size, max_rows, max_context, VOCAB)
    shape = KVShape(2, 2, 16, dtype)
    device = CpuDevice(num_threads=1)
    sizes = GraphSizes({})
    if graphs:
        most = min(max_rows, graph_max_sequences)
        multiple = device.row_multiple(dtype)
        sizes = GraphSizes.of(most, graph_widths, True, multiple, most_in_pieces)
    drafting = None if draft is None else Draft(draft, draft_shape or shape, num_drafts)
    worker = Worker(device, model, shape, limits, graphs=sizes, draft=drafting)
    return TinyExecutor(worker)


@dataclass
class Result:
    """What one choice got."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    num_cached: int = 0


@dataclass
class Served:
    """Results by (request id, choice), and what happened on the way."""

    results: dict[tuple[str, int], Result]
    scheduler: Scheduler
    batches: list[Batch]
    outputs: list[StepOutput]

    @property
    def tokens(self) -> dict[tuple[str, int], list[int]]:
        return {key: result.tokens for key, result in self.results.items()}


def serve(
    executor: LocalExecutor,
    requests: list[Request],
    *,
    overlap: bool = True,
    config: EngineConfig | None = None,
    speculation: Speculation | None = None,
    masks: Masks | None = None,
    arrive: int = 1,
) -> Served:
    """Serve requests, `arrive` more of them before every plan."""
    scheduler = Scheduler(executor.limits, config, EOS, speculation=speculation)
    served = Served({}, scheduler, [], [])
    waiting, flying = deque(requests), deque[Batch]()
    while waiting or scheduler.has_work:
        for _ in range(min(arrive, len(waiting))):
            scheduler.add(waiting.popleft())
        batch = scheduler.plan()
        if batch is not None:
            executor.dispatch(batch)
            if masks is not None:  # a grammar needs what came before
                _collect(executor, served, flying, 0)
            executor.sample(batch.step, None if masks is None else masks(batch))
            served.batches.append(batch)
            flying.append(batch)
        _collect(executor, served, flying, int(overlap) if batch is not None else 0)
        check_books(scheduler)
    return served


def _collect(executor: LocalExecutor, served: Served, flying: deque[Batch], down_to: int) -> None:
    while len(flying) > down_to:
        output = executor.collect()
        served.outputs.append(output)
        for delta in served.scheduler.update(flying.popleft(), output):
            _take(served, delta)


def _take(served: Served, delta: Delta) -> None:
    result = served.results.setdefault((delta.request_id, delta.choice), Result())
    result.tokens += delta.token_ids
    result.logprobs += delta.logprobs or []
    if delta.prompt_logprobs is not None:
        result.prompt_logprobs = (result.prompt_logprobs or []) + delta.prompt_logprobs
    result.finish_reason = delta.finish_reason
    result.num_cached = delta.num_cached_tokens


def full_logits(model: Decoder, token_ids: list[int]) -> np.ndarray:
    """Logits [T, V] of one sequence, computed at once from an empty cache."""
    count = len(token_ids)
    kv = [(torch.zeros(count, 2, 16), torch.zeros(count, 2, 16)) for _ in range(2)]
    inputs = ForwardInputs(
        input_ids=torch.tensor(token_ids, dtype=torch.int32),
        positions=torch.arange(count),
        cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32),
        seq_lens=torch.tensor([count], dtype=torch.int32),
        rows=torch.zeros(1, dtype=torch.int32),
        page_table=torch.arange(count, dtype=torch.int32)[None],
        slot_mapping=torch.arange(count),
        kv=kv,
        page_size=1,
        num_decode=0,
        max_seqlen_q=count,
    )
    return model.logits(model.forward(inputs)).numpy()


def judge(model: Decoder, request: Request, choice: int, result: Result) -> None:
    """Every token is what the oracle draws after those before it, and so are log-probabilities."""
    prompt, params = request.prompt_token_ids, request.params
    logits = full_logits(model, [*prompt, *result.tokens])
    for n, token in enumerate(result.tokens):
        raw = logits[len(prompt) - 1 + n]
        x = sampling.adjusted(raw, params, prompt, result.tokens[:n], EOS)
        best, margin = sampling.draw(x, params, choice, len(prompt) + n)
        if margin > 1e-3:
            assert token == best, (request.id, choice, n)
    if params.logprobs is not None:
        assert len(result.logprobs) == len(result.tokens)
        spans = zip(result.tokens, result.logprobs, logits[len(prompt) - 1 :], strict=False)
        for token, entry, raw in spans:
            check_logprobs(entry, token, raw, params.logprobs)
    if params.prompt_logprobs is not None:
        found = result.prompt_logprobs or []
        assert len(found) == len(prompt) - 1
        for token, entry, raw in zip(prompt[1:], found, logits, strict=False):
            check_logprobs(entry, token, raw, params.prompt_logprobs)


def check_logprobs(entry: TokenLogprobs, token: int, raw: np.ndarray, num_top: int) -> None:
    expected = raw.astype(np.float64) - np.logaddexp.reduce(raw.astype(np.float64))
    assert entry.token_id == token
    assert np.isclose(entry.logprob, expected[token], atol=1e-4)
    assert len(entry.top_ids) == len(entry.top_logprobs) == num_top
    assert np.allclose(entry.top_logprobs, np.sort(expected)[::-1][:num_top], atol=1e-4)
    assert np.allclose(expected[entry.top_ids], entry.top_logprobs, atol=1e-4)


def guesses(sequence, most: int) -> list[int]:
    return [(7 * sequence.num_tokens + i) % VOCAB for i in range(sequence.uid % 4)][:most]
