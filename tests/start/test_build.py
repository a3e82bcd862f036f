"""An engine built from a config alone, as `LLM`, the server and the spawned process do it."""

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from minisgl.build import build_engine
from minisgl.config import EngineConfig
from minisgl.core.costmodel import CostModel
from minisgl.core.request import Request, SamplingParams
from tests.world.configs import LLAMA


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return EngineConfig(
        model=str(tmp_path), load_format="dummy", device="cpu", max_total_tokens=640
    )


def test_an_engine_serves_and_says_what_it_is(config: EngineConfig, caplog):
    with caplog.at_level(logging.INFO, "minisgl"):
        engine = build_engine(config)
    try:
        assert engine.info.model == config.model
        assert engine.info.architecture == "LlamaForCausalLM"
        assert engine.info.dtype == "bfloat16"
        assert engine.info.device.startswith("CPU")
        assert engine.info.eos_token_ids == [3, 7]
        assert "running on CPU" in caplog.text
        params = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.0)
        engine.add(Request("r", [9, 8, 7], params))
        tokens = []
        while engine.has_work():
            for delta in engine.step():
                tokens += delta.token_ids
        assert engine.failure is None
        assert len(tokens) == 5
    finally:
        engine.close()
        engine.close()


def test_the_cost_model_counts_the_bytes_of_codes(tmp_path: Path, monkeypatch):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 320}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | sizes))
    seen = []
    monkeypatch.setattr(
        "minisgl.build.CostModel", lambda *args: seen.append(args[0]) or CostModel(*args)
    )
    for quantization in ("none", "int8", "int4"):
        options = {"load_format": "dummy", "device": "cpu", "max_total_tokens": 640}
        config = EngineConfig(model=str(tmp_path), quantization=quantization, **options)
        build_engine(config).close()
    floats, int8, int4 = (sizes.bytes_per_weight for sizes in seen)
    assert 2.0 < floats < 2.05  # norms are read, too
    assert int8 == pytest.approx(floats - 2 + 8.5 / 8, abs=0.01)
    head = seen[0].head_weights / seen[0].weights  # in int8
    assert int4 == pytest.approx(floats - 2 + (head * 8.5 + (1 - head) * 5) / 8, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp_size": 3}, r"tp_size must divide .*, got 3: .*q_proj \(4\) cannot"),
        (
            {"tp_size": 2, "nnodes": 2, "node_rank": 1, "dist_init_addr": "a:1"},
            "node_rank must be 0",
        ),
        ({"context_length": 1000}, "context_length must be at most"),
        ({"model": "/no/such/model/anywhere"}, "model"),
        ({"profile_dir": "/dev/null/x"}, "profile_dir: cannot make /dev/null/x"),
    ],
)
def test_a_build_that_fails_leaves_no_thread(config: EngineConfig, changes, message: str):
    facts = {name: getattr(config, name) for name in ("model", "load_format", "device")}
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match=message):
        build_engine(EngineConfig(**(facts | changes)))
    assert not {*threading.enumerate()} - before  # others' threads may end meanwhile


def test_building_needs_no_http_stack():
    code = (
        "import sys, minisgl.build; "
        "found = {'uvicorn', 'starlette', 'transformers', 'triton'} & set(sys.modules); "
        "sys.exit(f'imported: {found}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
