"""The CUDA device and its graphs: copies, streams, no host waits, one text with and without."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

# A machine for kernels alone may lack the engine's packages.
pytest.importorskip("triton")
pytest.importorskip("msgspec")
pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
pytest.importorskip("zmq")
pytest.importorskip("tokenizers")
pytest.importorskip("jinja2")

from benchmarks.steps import load, open_device, recorded
from minisgl.build import build_engine
from minisgl.config import EngineConfig
from minisgl.core.request import Request, SamplingParams
from minisgl.device import CpuDevice, CudaDevice, Cut, Device, Graph
from minisgl.engine.engine import Engine
from minisgl.layers.attention import ForwardInputs
from minisgl.step.executor import LocalExecutor

pytestmark = pytest.mark.gpu


IN_PIECES: dict[str, Any] = {"piecewise_cuda_graph_max_tokens": 100, "chunked_prefill_size": 64}
DRAFTING: dict[str, Any] = {
    "speculative_algorithm": "draft",
    "speculative_draft_model": "tiny-draft",
}


@pytest.fixture
def device(device_type: str) -> Iterator[Device]:
    made = CudaDevice() if device_type == "cuda" else CpuDevice(num_threads=1)
    yield made
    made.close()


@pytest.fixture(scope="module")
def config(device_type: str) -> EngineConfig:
    return EngineConfig(
        device=device_type, dtype="float32", max_total_tokens=8192, max_running_requests=20
    )


def requests() -> list[Request]:
    """More than one padded size, every half of sampling, prompts of more than one chunk."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 12, "top_p": 0.9},
        {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 2},
        {"temperature": 1.0, "frequency_penalty": 0.6, "logit_bias": {7: 2.0}},
    ]
    return [
        Request(
            f"{i}",
            [(5 * i + j) % 200 for j in range(3 + 7 * i)],
            SamplingParams(max_tokens=20 + i, seed=i, ignore_eos=True, **kinds[i % 4]),
        )
        for i in range(13)
    ]


def serve(engine: Engine, wanted: list[Request]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for request in wanted:
        engine.add(request)
    while engine.has_work():
        for delta in engine.step():
            found.setdefault(delta.request_id, []).extend(delta.token_ids)
    assert engine.failure is None
    return found


@pytest.fixture(scope="module")
def engine(config: EngineConfig) -> Iterator[Engine]:
    made = build_engine(config)
    yield made
    made.close()


@pytest.fixture(scope="module")
def in_pieces(config: EngineConfig) -> Iterator[Engine]:
    made = build_engine(replace(config, **IN_PIECES))
    yield made
    made.close()


@pytest.mark.usefixtures("gpu_only")
@pytest.mark.parametrize("made", ["engine", "in_pieces"])
def test_the_host_waits_at_events_only(made: str, request: pytest.FixtureRequest) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        serve(request.getfixturevalue(made), requests())
        with pytest.raises(RuntimeError):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("made", ["engine", "in_pieces"])
def test_nothing_is_compiled_after_the_engine_is_ready(
    made: str, request: pytest.FixtureRequest
) -> None:
    engine = request.getfixturevalue(made)
    serve(engine, requests())
    assert engine.stats().compilations == 0


@pytest.mark.usefixtures("gpu_only")
def test_pieces_are_captured_before_serving_and_replayed_in_it(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece more than there are layers, and attention eagerly between them."""
    captured: list[Any] = []
    capture = CudaDevice.capture_pieces

    def noted_capture(self: CudaDevice, run: Callable[[Cut], None]) -> Graph:
        captured.append(capture(self, run))
        return captured[-1]

    monkeypatch.setattr(CudaDevice, "capture_pieces", noted_capture)
    with open_device("cuda") as device:
        facts, worker = load(replace(config, **IN_PIECES), device)
        pieces = worker.runner.pieces
        before = pieces.captured
        assert sorted(before) == list(worker.geometry.piece_sizes)
        assert [len(graph.graphs) for graph in captured] == [facts.model.num_layers + 1] * len(
            before
        )
        sizes: list[int] = []
        forward = pieces.forward

        def noted(inputs: ForwardInputs) -> torch.Tensor:
            sizes.append(len(inputs.input_ids))
            return forward(inputs)

        monkeypatch.setattr(pieces, "forward", noted)
        engine, _ = recorded(LocalExecutor(worker), facts.config)
        serve(engine, requests())
        assert len(set(sizes)) > 1
        assert set(sizes) <= set(before)
        assert len(captured) == len(before)


@pytest.mark.parametrize(
    "changes",
    [
        {"disable_cuda_graph": True},
        {"disable_overlap_schedule": True},
        {"chunked_prefill_size": 16},
        {"cuda_graph_max_bs": 4},
        IN_PIECES,
        IN_PIECES | {"chunked_prefill_size": 16, "speculative_algorithm": "ngram"},
        DRAFTING,
    ],
    ids=str,
)
def test_the_tokens_do_not_depend_on_how_steps_are_run(
    engine: Engine, config: EngineConfig, changes: dict[str, Any]
) -> None:
    other = build_engine(replace(config, **changes))
    try:
        assert serve(other, requests()) == serve(engine, requests())
    finally:
        other.close()


def test_a_fixed_order_is_kept_in_pieces(config: EngineConfig) -> None:
    """Attention too, which runs outside of what was captured."""
    fixed = replace(config, dtype="bfloat16", batch_invariant=True)
    tokens = []
    for changes in ({}, IN_PIECES):
        engine = build_engine(replace(fixed, **changes))
        try:
            tokens.append(serve(engine, requests()))
        finally:
            engine.close()
    assert tokens[0] == tokens[1]


def test_uploads_arrive_whatever_their_size(device: Device) -> None:
    """None takes the memory of one that the device has yet to read; the host does not wait."""
    sizes = [1, 7, 4096, 2**22, 2**22, 2**24, 2**25, 3]
    arrays = [np.arange(size, dtype=np.int32) * (i + 1) for i, size in enumerate(sizes)]
    sent = [device.run(device.upload, array) for array in arrays]
    place = device.run(device.zeros, (10,), torch.int32)
    device.run(device.upload, arrays[1], place)
    device.record().wait()
    for array, tensor in zip(arrays, sent, strict=True):
        assert torch.equal(tensor.cpu(), torch.from_numpy(array))
    assert place.tolist() == [*arrays[1].tolist(), 0, 0, 0]


def test_downloads_are_of_the_moment_and_stay(device: Device) -> None:
    """What is written later does not reach them, and new ones leave them alone."""
    source = device.run(device.zeros, (2**19,), torch.int32)
    kept = []
    for number in range(12):
        device.run(device.await_downloads)
        device.run(source.fill_, number)
        kept.append(device.run(device.download, source))
    device.landed().wait()
    for number, tensor in enumerate(kept):
        assert (tensor == number).all()


def test_a_graph_replays_on_its_buffers(device: Device) -> None:
    x, y = (device.run(device.zeros, (5,), torch.float32) for _ in range(2))
    graph = device.run(device.capture, lambda: torch.add(x, 1, out=y))
    for value in (3.0, 8.0):
        device.run(x.fill_, value)
        device.run(graph.replay)
        result = device.run(device.download, y)
        device.landed().wait()
        assert result.tolist() == [value + 1] * 5
