"""Every kernel that serving can need is compiled before it starts, and none while it serves.

`compile_ahead` compiles the launches of a model in parallel processes into Triton's cache on disk;
no GPU is needed, so it may also run where an image is built. `load` then takes them from there into
this process. `CompileCounter` counts what Triton compiles or loads afterwards, which should be
nothing. Import this module only where kernels run on a GPU: it imports Triton.

    python -m minisgl.kernels.warmup --arch 90 < shapes.json
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton

from minisgl.kernels.config import table_for
from minisgl.kernels.launches import Launch, serving_launches
from minisgl.kernels.offline import compile_only, offline
from minisgl.kernels.shapes import EngineShapes, ModelShapes

MOST_PROCESSES = 16  # a model has some hundred kernels, and each process imports torch

__all__ = [
    "CompileCounter",
    "EngineShapes",
    "Launch",
    "ModelShapes",
    "compile_ahead",
    "load",
    "serving_launches",
]


class CompileCounter:
    """Kernels that this process has compiled, or found on disk, since `install`."""

    def __init__(self) -> None:
        self.compiled = 0
        self.loaded = 0
        self.names: list[str] = []

    @property
    def total(self) -> int:
        """First launches of a kernel's variants; each of them delayed a step."""
        return self.compiled + self.loaded

    def install(self) -> None:
        """Listen to Triton's compiler; listeners that are there already stay."""
        before = triton.knobs.compilation.listener

        def listen(*, src: Any, cache_hit: bool, **facts: Any) -> None:
            self.compiled += not cache_hit
            self.loaded += cache_hit
            self.names.append(src.name)
            if before is not None:
                before(src=src, cache_hit=cache_hit, **facts)

        triton.knobs.compilation.listener = listen


def compile_ahead(
    model: ModelShapes, engine: EngineShapes, arch: int, processes: int | None = None
) -> int:
    """Compile `serving_launches` for sm_`arch` into the cache on disk; how many were not there.

    processes: by default one for each CPU core, up to MOST_PROCESSES. Raises RuntimeError with
    the output of a process that fails.
    """
    count = processes or min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    shapes = json.dumps({"model": asdict(model), "engine": asdict(engine)})
    words = [sys.executable, "-m", "minisgl.kernels.warmup", "--arch", str(arch)]
    running = []
    for part in range(count):
        process = subprocess.Popen(
            [*words, "--part", str(part), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],  # where `-m` finds this package, installed or not
        )
        assert process.stdin is not None
        process.stdin.write(shapes)
        process.stdin.close()
        process.stdin = None  # `communicate` is only to read
        running.append(process)
    compiled, failures = 0, []
    for process in running:
        output, errors = process.communicate()
        if process.returncode:
            failures.append(errors[-2000:])
        else:
            compiled += json.loads(output)["compiled"]
    if failures:
        raise RuntimeError(f"compiling kernels for sm_{arch} failed:\n{failures[0]}")
    return compiled


def load(launches: Iterable[Launch], arch: int) -> None:
    """Compile or find the launches' kernels in this process, and load them on its GPU, sm_`arch`.

    Their first launches then take no longer than later ones. Call it on the thread that serves.
    """
    with compile_only(arch) as kernels:
        for launch in launches:
            launch.run()
    for kernel in kernels:
        kernel._init_handles()


def _shapes(content: Mapping[str, Any]) -> tuple[ModelShapes, EngineShapes]:
    """From JSON, in which tuples have become lists."""

    def frozen(value: Any) -> Any:
        return tuple(frozen(item) for item in value) if isinstance(value, list) else value

    model, engine = (
        {name: frozen(value) for name, value in content[part].items()}
        for part in ("model", "engine")
    )
    return ModelShapes(**model), EngineShapes(**engine)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="minisgl.kernels.warmup", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, required=True, help="of the GPU, 90 for sm_90")
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), metavar=("I", "N"))
    options = parser.parse_args(words)
    model, engine = _shapes(json.load(sys.stdin))
    counter = CompileCounter()
    counter.install()
    part, parts = options.part
    with offline(options.arch):
        for launch in list(serving_launches(model, engine, table_for(options.arch)))[part::parts]:
            launch.run()
    print(json.dumps({"compiled": counter.compiled, "loaded": counter.loaded}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
