"""`python -m tests.server.loading_engine ...`: a server whose engine takes a minute to load."""

import sys
import time

from minisgl import serve
from minisgl.config import EngineConfig
from minisgl.engine.engine import Engine


def build(config: EngineConfig) -> Engine:
    time.sleep(60)
    raise RuntimeError("nobody waits for this engine")


if __name__ == "__main__":
    serve.FACTORY = "tests.server.loading_engine:build"
    sys.exit(serve.main())
