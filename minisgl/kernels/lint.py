"""The compile gate: every kernel the engine launches, compiled for each GPU with no GPU at hand.

    python -m minisgl.kernels.lint [--arch 90] [--op decode] [--baseline FILE] [--write FILE]

Each launch of `gate` is compiled as `offline` does it and the cubins are read: registers, local
memory, shared memory, and the instructions that matter for speed.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton

from minisgl.kernels.config import ARCHITECTURES
from minisgl.kernels.gate import launches
from minisgl.kernels.launches import Launch
from minisgl.kernels.offline import offline

ARCHES = tuple(ARCHITECTURES)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

# Instructions counted in the machine code, by the name they are reported under.
INSTRUCTIONS = {
    "wgmma": r"\bHGMMA",  # warpgroup matrix product (sm_90)
    "mma": r"\bHMMA",  # warp matrix product
    "tcgen05": r"\bUTC\w*MMA",  # tensor-memory matrix product (sm_100)
    "tma": r"\bUTMALDG",  # bulk tensor copy into shared memory
    "cp_async": r"\bLDGSTS",  # asynchronous copy into shared memory
    "load128": r"\bLDG\.[\w.]*128|\bLDGSTS\.[\w.]*128",
    "load": r"\bLDG\.|\bLDGSTS\.",
    "store128": r"\bSTG\.[\w.]*128",
    "store": r"\bSTG\.",
    "wgmma_wait": r"WARPGROUP\.DEPBAR",
    "set_registers": r"USETMAXREG",
}


@dataclass(frozen=True)
class Report:
    """What one compiled kernel uses. `local` is bytes of stack and spills per thread."""

    label: str
    kernel: str
    arch: int
    registers: int
    local: int
    shared: int
    warps: int
    counts: dict[str, int] = field(default_factory=dict)
    ordinal: int = 0  # among the variants of this kernel in one launch

    @property
    def key(self) -> str:
        variant = f" #{self.ordinal}" if self.ordinal else ""
        return f"{self.label} {self.kernel} sm_{self.arch}{variant}"

    def row(self) -> str:
        counts = " ".join(f"{name}={n}" for name, n in self.counts.items() if n)
        return (
            f"{self.label:44s} {self.kernel:22s} sm_{self.arch:<4d}"
            f"{self.registers:4d} regs {self.local:4d} local {self.shared:7d} shared  {counts}"
        )


@lru_cache
def _dumped(cubin: bytes, *options: str) -> str:
    """The output of `cuobjdump`, which comes with Triton, for a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def machine_code(compiled: Any) -> str:
    """The instructions of a compiled kernel (SASS)."""
    return _dumped(compiled.asm["cubin"], "-sass")


def read(label: str, arch: int, compiled: Any, *, instructions: bool = True) -> Report:
    """What a compiled kernel uses. Disassembly takes longer than most kernels take to compile, so
    `instructions` are counted where something is claimed of them."""
    cubin = compiled.asm["cubin"]
    usage = _dumped(cubin, "-res-usage")
    code = machine_code(compiled) if instructions else ""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{label}: cuobjdump gave no resource usage")
    registers, stack, local = (int(number) for number in found.groups())
    return Report(
        label,
        compiled.metadata.name,
        arch,
        registers,
        stack + local,
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()},
    )


def reports(launch: Launch, arch: int) -> list[Report]:
    """Compiles every kernel of one launch for sm_`arch`."""
    with offline(arch) as compiled:
        launch.run()
    if not compiled:
        raise RuntimeError(f"{launch.label}: the launcher launched nothing")
    found: list[Report] = []
    for kernel in compiled:
        claims = bool(launch.expects(kernel.metadata.name, arch))
        report = read(launch.label, arch, kernel, instructions=claims)
        before = sum(report.kernel == other.kernel for other in found)
        found.append(replace(report, ordinal=before))
    return found


def problems(report: Report, launch: Launch) -> list[str]:
    """What is wrong with one kernel; empty when it passes."""
    found = []
    limit = ARCHITECTURES[report.arch].shared_bytes
    if report.local:
        found.append(f"{report.local} bytes of local memory")
    if report.shared > limit:
        found.append(f"{report.shared} bytes of shared memory, limit {limit}")
    if report.registers * report.warps * 32 > 65536:
        found.append(f"{report.registers} registers in {report.warps} warps exceed the file")
    for name in launch.expects(report.kernel, report.arch):
        if not report.counts[name]:
            found.append(f"no {name} in the machine code")
    if report.counts["wgmma"] >= 8 and 2 * report.counts["wgmma_wait"] > report.counts["wgmma"]:
        found.append("wgmma is serialised: more than one wait for two products")
    return found


def regressions(report: Report, baseline: dict[str, Any]) -> list[str]:
    """Where a kernel is worse than the committed figures for this version of Triton."""
    known = baseline.get(report.key)
    if known is None:
        return ["not in the baseline; write it with --write"]
    found = [
        f"{name} {getattr(report, name)}, baseline {known[name]}"
        for name in ("registers", "local", "shared")
        if getattr(report, name) > known[name]
    ]
    for name in ("load128", "store128", "tma"):
        if report.counts[name] < known["counts"].get(name, 0):
            found.append(f"{name} {report.counts[name]}, baseline {known['counts'][name]}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="minisgl.kernels.lint", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--arch", type=int, action="append", choices=list(ARCHITECTURES))
    parser.add_argument("--op", action="append", help="only launches whose label begins so")
    parser.add_argument("--baseline", type=Path, help="fail on figures worse than this file's")
    parser.add_argument("--write", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET=1 is set: kernels are interpreted, nothing is compiled")
    baseline = json.loads(options.baseline.read_text()) if options.baseline else None
    table, failures = {}, 0
    for arch in options.arch or ARCHES:
        for launch in launches(arch):
            if options.op and not launch.label.startswith(tuple(options.op)):
                continue
            for report in reports(launch, arch):
                found = problems(report, launch)
                found += regressions(report, baseline) if baseline is not None else []
                failures += bool(found)
                table[report.key] = {
                    name: value
                    for name, value in asdict(report).items()
                    if name in ("registers", "local", "shared", "counts")
                }
                table[report.key]["counts"] = {n: c for n, c in report.counts.items() if c}
                print(report.row(), *(f"\n    ! {text}" for text in found), flush=True)
    print(f"{len(table)} kernels compiled by triton {triton.__version__}, {failures} with problems")
    if options.write:
        lines = (f" {json.dumps(k)}: {json.dumps(table[k], sort_keys=True)}" for k in sorted(table))
        options.write.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
