"""What the kernels of csrc/cuda use on each architecture, as nvcc reports it.

python -m tests.compile.nvcc [--write]     prints the table, and writes it as the baseline
"""

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from minisgl.csrc.build import MODULES, SOURCES, Target, find_compiler

ARCHS = ("80", "90a", "100")
BASELINE = Path(__file__).parent / "nvcc-13.0.json"
TYPES = {"13__nv_bfloat16": "bf16", "6__half": "fp16", "f": "fp32"}
PATHS = ("one_shot", "two_shot", "multimem")


@dataclass(frozen=True)
class Usage:
    """`local` is bytes of stack and spills per thread, `shared` static bytes per block."""

    registers: int
    local: int
    shared: int


def version() -> str:
    """nvcc's, as in "13.0"."""
    done = subprocess.run([find_compiler("cuda"), "--version"], capture_output=True, text=True)
    return re.search(r"release ([\d.]+)", done.stdout)[1]


def readable(symbol: str) -> str:
    """all_reduce_kernel<bf16, two_shot, norm> of its symbol; other names as they are."""
    found = re.search(r"all_reduce_kernelI(\w+?)LNS\w*?_4PathE(\d)ELb([01])E", symbol)
    if found is None:
        return symbol
    words = [TYPES[found[1]], PATHS[int(found[2])], *(["norm"] if found[3] == "1" else [])]
    return f"all_reduce_kernel<{', '.join(words)}>"


def parse(report: str) -> Iterator[tuple[str, Usage]]:
    """(symbol, usage) of each kernel in what `-Xptxas -v` prints."""
    for block in re.split(r"Compiling entry function '", report)[1:]:
        symbol = block.split("'")[0]
        local = sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill \w+)", block)))
        shared = re.search(r"(\d+) bytes smem", block)
        registers = int(re.search(r"Used (\d+) registers", block)[1])
        yield symbol, Usage(registers, local, int(shared[1]) if shared else 0)


def compile_for(arch: str) -> dict[str, Usage]:
    """Usage of every kernel of every CUDA module, by "module kernel sm_arch"."""
    found = {}
    for module in MODULES:
        for source in module.sources:
            if module.kind != "cuda" or not source.endswith(".cu"):
                continue
            with tempfile.TemporaryDirectory() as folder:
                flags = [*Target(module, arch).flags, "-cubin", "-Xptxas=-v"]
                words = [find_compiler("cuda"), *flags, "-I", SOURCES, SOURCES / source]
                done = subprocess.run(
                    [*words, "-o", f"{folder}/out.cubin"], capture_output=True, text=True
                )
            if done.returncode:
                raise RuntimeError(f"{source} for sm_{arch}: {done.stderr}")
            for symbol, usage in parse(done.stdout + done.stderr):
                found[f"{module.name} {readable(symbol)} sm_{arch}"] = usage
    return found


def compile_all() -> dict[str, Usage]:
    """The same for all of ARCHS, side by side."""
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(compile_for, ARCHS))
    return {key: usage for part in parts for key, usage in sorted(part.items())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {BASELINE.name}")
    write = parser.parse_args().write
    found = compile_all()
    for key, usage in found.items():
        print(f"{key:64} {usage.registers:4} regs {usage.local:4} local {usage.shared:6} shared")
    if write:
        if not BASELINE.name.startswith(f"nvcc-{version()}."):
            raise SystemExit(f"{BASELINE.name} is of another nvcc than {version()}")
        kept = {key: asdict(usage) for key, usage in found.items()}
        BASELINE.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
