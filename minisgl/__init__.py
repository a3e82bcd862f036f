"""minisgl: a small, fast, readable LLM serving engine.

Importing the package imports nothing else: names below load their module at first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minisgl.completion import RequestOutput
    from minisgl.core.request import SamplingParams
    from minisgl.llm import LLM, AsyncLLM

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "RequestOutput", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "minisgl.llm",
    "AsyncLLM": "minisgl.llm",
    "RequestOutput": "minisgl.completion",
    "SamplingParams": "minisgl.core.request",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'minisgl' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value  # later look-ups do not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
