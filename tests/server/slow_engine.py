"""The factory of an engine process without a model and without torch, at 100 steps a second.

`python -m tests.server.slow_engine ...` is `python -m minisgl.serve ...` around it.
"""

import sys
from pathlib import Path

import msgspec

from minisgl import serve
from minisgl.config import EngineConfig
from minisgl.engine.engine import Engine
from tests.world.engine import LIMITS, make_engine


def build(config: EngineConfig) -> Engine:
    """`config.model` is a directory with a tokenizer."""
    if not Path(config.model, "tokenizer.json").exists():
        raise FileNotFoundError(f"{config.model} holds no model")
    limits = msgspec.structs.replace(LIMITS, num_pages=8192, max_context=65536)
    engine = make_engine(limits=limits, seconds=0.01)
    engine.info = msgspec.structs.replace(engine.info, model_path=config.model)
    return engine


if __name__ == "__main__":
    serve.FACTORY = "tests.server.slow_engine:build"
    sys.exit(serve.main())
