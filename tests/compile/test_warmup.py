"""What is compiled ahead is what a launch looks up, and the counter sees whatever is not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

from minisgl.config import EngineConfig
from minisgl.core.executor import Limits
from minisgl.device.meta import MetaDevice
from minisgl.kernels.activation.portable import silu_and_mul_portable
from minisgl.kernels.attention import attention
from minisgl.kernels.offline import offline, recorded
from minisgl.kernels.warmup import CompileCounter, load
from minisgl.layers.weights import Placement
from minisgl.models.decoder import Decoder
from minisgl.start.facts import read_facts
from minisgl.start.launches import Start, compile_ahead, launched, serve

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 1000,
    "hidden_size": 192,
    "intermediate_size": 320,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
LIMITS = Limits(64, 16, 2, 128, 1000)


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Of an engine without drafts on a GPU."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    config = EngineConfig(max_running_requests=2, chunked_prefill_size=64)
    return Start(config, str(tmp_path), LIMITS, 90)


@pytest.fixture
def counter(monkeypatch):
    made = CompileCounter()
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    made.install()
    return made


def test_each_kernel_is_compiled_by_one_process_and_then_on_disk(start, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled, variants = compile_ahead(start, processes=3)
    assert compiled == len(variants) == len(set(variants)) == len(launched(start))
    assert compile_ahead(start, processes=1) == (0, variants)
    assert compile_ahead(start, processes=0) == (0, variants)


def test_a_start_compiles_nothing_that_was_not_loaded(start, monkeypatch, counter):
    monkeypatch.setattr(triton.compiler.CompiledKernel, "_init_handles", lambda kernel: None)
    _, variants = compile_ahead(start, processes=2)
    with offline(90):
        load(variants)
        before = counter.total
        assert before == len(variants)
        serve(read_facts(start.config, Path(start.path), MetaDevice()), start.limits)
    assert counter.names[before:] == []


def test_a_start_without_drafts_launches_no_kernel_of_drafts(start):
    found = [variant.facts for variant in launched(start)]
    assert {facts["K"] for facts in found if facts.keys() >= {"K", "counts_ptr"}} == {0}
    assert {facts["WIDTH"] for facts in found if "WIDTH" in facts} == {0, 1}  # 0: of chunks
    config = replace(start.config, speculative_algorithm="ngram", speculative_num_draft_tokens=2)
    found = [variant.facts for variant in launched(replace(start, config=config))]
    assert {facts["K"] for facts in found if facts.keys() >= {"K", "counts_ptr"}} == {0, 1, 2}
    assert {facts["WIDTH"] for facts in found if "WIDTH" in facts} == {0, 1, 2, 3}


def test_products_with_weights_in_codes_are_among_them(start):
    """The forms of what was loaded reach the processes that find the kernels; one layer differs."""
    model = read_facts(start.config, Path(start.path), MetaDevice()).model
    blocks = Decoder(model, Placement(model.dtype, torch.device("meta"))).blocks()
    forms = [((4, 32, True, True),) * len(block.forms()) for block in blocks]
    forms[3] = ((8, 64, True, False),) * len(forms[3])
    _, plain = compile_ahead(start, processes=0)
    _, coded = compile_ahead(replace(start, forms=(forms, ())), processes=0)
    new = [json.loads(data) for data in {*coded} - {*plain}]
    assert {data["name"].rpartition(".")[2] for data in new} >= {"few_rows_kernel", "tiles_kernel"}
    found = [variant.facts for variant in launched(replace(start, forms=(forms, ())))]
    assert {facts["BITS"] for facts in found if "BITS" in facts} == {4, 8}


def test_what_triton_cannot_say_is_left_out():
    """A kernel in Gluon has layouts for constants; it is compiled, but another process cannot
    be told of it."""
    meta, generator = torch.device("meta"), torch.Generator().manual_seed(0)
    with recorded(90) as launches:
        arguments = attention.variants["hopper"][0].make(meta, torch.bfloat16, generator)
        attention.implementation("hopper")(**arguments)
        silu_and_mul_portable(torch.empty(3, 2 * 424, device="meta"))
    said = [variant.data() is not None for variant in launches.values()]
    assert said == [True, False, True]  # the first makes the list that the second works through


def test_the_counter_tells_compiled_from_found_and_known(tmp_path, monkeypatch, counter):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.empty(3, 2 * 424, device="meta")

    def launch(arch: int, times: int = 1) -> tuple[int, int]:
        with offline(arch):
            for _ in range(times):
                silu_and_mul_portable(x)
        return counter.compiled, counter.loaded

    assert launch(90, times=2) == (1, 0)  # the second is known to this device
    assert launch(80) == (2, 0)
    assert launch(90) == (2, 1)  # found on disk
    assert counter.total == 3
    assert set(counter.names) == {"gated_kernel"}


def test_a_failing_process_is_reported(start, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"head_dim": 512}))
    with pytest.raises(RuntimeError, match="head_dim must be at most 256, got 512"):
        compile_ahead(start, processes=1)


def test_prompts_are_computed_by_the_kernel_that_was_chosen(start, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"head_dim": 128}))
    start = replace(start, config=replace(start.config, attention_backend="gluon"))
    names = {variant.name for variant in launched(start)}
    assert "attention_hopper_kernel" in names
    assert "attention_kernel" not in names
