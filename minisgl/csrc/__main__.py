"""`python -m minisgl.csrc build [--arch 80,90a] [--cpu-level avx2]`: build ahead of time."""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TextIO

from minisgl.csrc.build import (
    LEVELS,
    MODULES,
    BuildError,
    Target,
    Unavailable,
    cpu_level,
    present_archs,
)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print by one write, so that the lines of builds at the same time do not run together."""
    stream = stream or sys.stdout
    stream.write(f"csrc: {text}\n")
    stream.flush()


def report(target: Target) -> bool:
    """Build one target and print one line about it; False if it was tried and failed."""
    try:
        begin, found = time.perf_counter(), target.library.exists()
        if not found:
            say(target.begins)
        target.build(lambda text: say(f"{target}: {text}"))
    except Unavailable as error:
        say(f"{target}: not built: {error}; {target.module.twin}")
        return True  # this machine is served by the twin: nothing has failed
    except (BuildError, OSError) as error:
        what, *compiler_lines = str(error).split("\n")
        say("\n".join([f"{what}; {target.module.twin}", *compiler_lines]), sys.stderr)
        return False
    took = "up to date" if found else f"built in {time.perf_counter() - begin:.1f} s"
    say(f"{target}: {took}")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m minisgl.csrc", description=__doc__)
    build = parser.add_subparsers(dest="command", required=True).add_parser("build")
    build.add_argument(
        "--arch",
        help="GPU architectures for the CUDA modules, as nvcc spells them, joined by commas; "
        "default: those of the GPUs present",
    )
    build.add_argument(
        "--cpu-level", choices=LEVELS, help="instructions of the CPU modules; default: this CPU's"
    )
    arguments = parser.parse_args()
    archs = arguments.arch.split(",") if arguments.arch else present_archs()
    targets = [
        Target(module, arch)
        for module in MODULES
        for arch in (archs if module.kind == "cuda" else [arguments.cpu_level or cpu_level()])
    ]
    with ThreadPoolExecutor() as pool:
        results = list(pool.map(report, targets))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
