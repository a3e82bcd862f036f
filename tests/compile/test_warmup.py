"""What is compiled ahead is what a launch looks up, and the counter sees whatever is not."""

from dataclasses import replace

import pytest
import torch
import triton

from minisgl.kernels.activation.portable import gated_kernel, silu_and_mul_portable
from minisgl.kernels.config import table_for
from minisgl.kernels.offline import offline
from minisgl.kernels.warmup import (
    CompileCounter,
    EngineShapes,
    ModelShapes,
    compile_ahead,
    serving_launches,
)

MODEL = ModelShapes("small", 4, 2, 64, 192, 1000, 2, inner=320, qk_norm=True)
ENGINE = EngineShapes(16, 64, 8, 2)


@pytest.fixture
def counter(monkeypatch):
    made = CompileCounter()
    monkeypatch.setattr(triton.knobs.compilation, "listener", None)
    made.install()
    return made


def test_a_new_process_finds_everything_that_was_compiled_ahead(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiled = compile_ahead(MODEL, ENGINE, 90, processes=2)
    assert compiled >= len(list(serving_launches(MODEL, ENGINE, table_for(90))))
    assert compile_ahead(MODEL, ENGINE, 90, processes=1) == 0


def test_a_failing_process_is_reported():
    with pytest.raises(RuntimeError, match="head_dim must be at most 256, got 512"):
        compile_ahead(replace(MODEL, head_dim=512), ENGINE, 90, processes=1)


def test_the_counter_tells_compiled_from_found_and_known(tmp_path, monkeypatch, counter):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x = torch.empty(3, 2 * 424, device="meta")

    def launch(arch: int) -> tuple[int, int]:
        with offline(arch):
            silu_and_mul_portable(x)
        return counter.compiled, counter.loaded

    assert launch(90) == (1, 0)
    assert launch(90) == (1, 0)  # known to this process
    assert launch(80) == (2, 0)
    gated_kernel.device_caches.clear()
    assert launch(90) == (2, 1)  # found on disk
    assert counter.total == 3
    assert set(counter.names) == {"gated_kernel"}


def test_prompts_are_warmed_up_by_the_kernel_that_was_chosen():
    model = replace(MODEL, head_dim=128, attention="hopper")
    every = serving_launches(model, ENGINE, table_for(90))
    prompts = [launch for launch in every if launch.label.startswith("attention ")]
    with offline(90) as compiled:
        for launch in prompts:
            launch.run()
    assert {kernel.metadata.name for kernel in compiled} == {"attention_hopper_kernel"}


def test_every_step_of_a_batch_invariant_engine_is_one_number_of_runs():
    fixed = list(serving_launches(MODEL, replace(ENGINE, batch_invariant=True), table_for(90)))
    assert [x.label for x in fixed if "runs" in x.label] == []
    assert all(x.in_fixed_order for x in fixed if x.label.startswith("decode"))
