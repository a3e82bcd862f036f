"""An engine without a model, and the factory of its process: a scheduler on the hash executor."""

import os
import signal
import sys
from typing import Any
from unittest.mock import patch

from minisgl.config import EngineConfig
from minisgl.core.executor import Limits
from minisgl.core.grammar import GrammarBackend
from minisgl.core.request import Request
from minisgl.core.scheduler import Scheduler
from minisgl.engine.engine import Engine
from minisgl.engine.messages import EngineInfo
from tests.world.hash_executor import EOS, HashExecutor, reference

LIMITS = Limits(num_pages=400, page_size=16, max_rows=16, max_context=256, vocab_size=97)


def expected(request: Request, choice: int = 0) -> list[int]:
    """The tokens that `make_engine` must yield for a choice, computed without an engine."""
    tokens, _ = reference(request, choice, LIMITS)
    return tokens


def make_engine(
    *,
    limits: Limits = LIMITS,
    overlap: bool = True,
    grammar_backend: GrammarBackend | None = None,
    force_tokens: bool = True,
    fail_at: int | None = None,
    seconds: float | None = None,
    profile_dir: str | None = None,
) -> Engine:
    """An engine over a `HashExecutor`, which it shows as `engine.executor`; `engine.scheduler`."""
    executor = HashExecutor(limits, fail_at=fail_at, seconds=seconds)
    scheduler = Scheduler(limits, EngineConfig(chunked_prefill_size=48), (EOS,))
    info = EngineInfo("fake", "", "Fake", "float32", "cpu", [EOS], limits)
    engine = Engine(
        scheduler,
        executor,
        info,
        overlap=overlap,
        grammar_backend=grammar_backend,
        force_tokens=force_tokens,
        profile_dir=profile_dir,
    )
    engine.executor = executor  # type: ignore[attr-defined]
    engine.scheduler = scheduler  # type: ignore[attr-defined]
    return engine


def make_llm(engine: Engine) -> Any:
    """An `LLM` around an engine, which it owns from now on."""
    from minisgl import LLM  # here: the engine's process needs none of it

    with patch("minisgl.build.build_engine", lambda config: engine):
        return LLM()


def build(config: EngineConfig) -> Engine:
    """The factory for engine processes. `config.model` is what to plant: "seconds=0.1" or so."""
    planted = dict(item.split("=") for item in (config.model or "").split(",") if item)
    if "refuse" in planted:
        raise ValueError("planted: the model cannot be loaded")
    if "crash" in planted:
        print("planted: last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    print("x" * int(planted.get("says", 0)), file=sys.stderr)
    fail_at = int(planted["fail_at"]) if "fail_at" in planted else None
    return make_engine(
        fail_at=fail_at,
        seconds=float(planted["seconds"]) if "seconds" in planted else None,
        profile_dir=config.profile_dir,
    )
