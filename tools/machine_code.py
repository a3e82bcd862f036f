"""What compiled kernels use: registers, local and shared memory, the instructions that matter.

Read from their cubins; `tools.compile_gate` does so for every kernel that is served.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import triton

from minisgl.kernels.config import ARCHITECTURES
from minisgl.kernels.offline import Variant
from minisgl.kernels.op import all_ops

TRITON = triton.__version__
INTERPRETED = triton.knobs.runtime.interpret  # then nothing is compiled
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
    arch: int
    registers: int
    local: int
    shared: int
    warps: int
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.label} sm_{self.arch}"

    def row(self) -> str:
        counts = " ".join(f"{name}={n}" for name, n in self.counts.items() if n)
        return (
            f"{self.label:60s} sm_{self.arch:<4d}"
            f"{self.registers:4d} regs {self.local:4d} local {self.shared:7d} shared  {counts}"
        )

    def figures(self) -> dict[str, Any]:
        """What the baseline has of it."""
        counts = {name: n for name, n in self.counts.items() if n}
        figures = {"counts": counts, "local": self.local, "registers": self.registers}
        return figures | {"shared": self.shared}


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


def expected(variant: Variant) -> list[str]:
    """The instructions that the cards want to see in it."""
    facts = variant.facts
    names = [
        name
        for card in all_ops()
        for claim in card.expected
        if claim.kernel == variant.name and claim.where(facts)
        for name in claim.instructions
    ]
    # Warpgroups multiply 64 rows or more of 16 bits, those of the first parameter.
    wide = facts.get("BLOCK_M", 64) >= 64 and next(iter(facts.values())) != "*fp32"
    return [name for name in names if name != "wgmma" or (variant.arch == 90 and wide)]


def read(label: str, variant: Variant) -> Report:
    """Compile a kernel and read what it uses. Disassembly takes longer than most kernels take to
    compile, so instructions are counted where something is expected of them."""
    compiled = variant.compile()
    usage = _dumped(compiled.asm["cubin"], "-res-usage")
    code = machine_code(compiled) if expected(variant) else ""
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{label}: cuobjdump gave no resource usage")
    registers, stack, local = (int(number) for number in found.groups())
    return Report(
        label,
        variant.arch,
        registers,
        stack + local,
        compiled.metadata.shared,
        compiled.metadata.num_warps,
        {name: len(re.findall(pattern, code)) for name, pattern in INSTRUCTIONS.items()},
    )


def problems(report: Report, expected: Sequence[str]) -> list[str]:
    """What is wrong with one kernel; empty when it passes."""
    found = []
    limit = ARCHITECTURES[report.arch].shared_bytes
    if report.local:
        found.append(f"{report.local} bytes of local memory")
    if report.shared > limit:
        found.append(f"{report.shared} bytes of shared memory, limit {limit}")
    if report.registers * report.warps * 32 > 65536:
        found.append(f"{report.registers} registers in {report.warps} warps exceed the file")
    found += [f"no {name} in the machine code" for name in expected if not report.counts[name]]
    if report.counts["wgmma"] >= 8 and 2 * report.counts["wgmma_wait"] > report.counts["wgmma"]:
        found.append("wgmma is serialised: more than one wait for two products")
    return found


def regressions(report: Report, baseline: Mapping[str, Any]) -> list[str]:
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
