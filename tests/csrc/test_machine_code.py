"""What the compiler makes of the loop that most of a prompt's time is spent in."""

import platform
import re
import subprocess
from pathlib import Path

import pytest

from minisgl.csrc.build import LEVELS, find_compiler, find_headers
from tests.csrc.test_loader import needs_compiler

SOURCES = Path(__file__).parents[2] / "csrc"
TILE = """
#include "cpu/panels.h"
void tile(const Operand *x, Index stride, const bf16 *panel, Index k, float *out) {
    const Operand *rows[TILE_ROWS];
    const bf16 *w[TILE_VECTORS];
    for (int t = 0; t < TILE_ROWS; ++t) rows[t] = x + t * stride;
    for (int v = 0; v < TILE_VECTORS; ++v) w[v] = panel + v / 2 * WIDTH * k + v % 2 * WIDTH;
    f32x16 sums[TILE_ROWS][TILE_VECTORS] = {};
    add_tile(rows, w, k, sums);
    for (int t = 0; t < TILE_ROWS; ++t)
        for (int v = 0; v < TILE_VECTORS; ++v, out += 16) store16(out, sums[t][v]);
}
"""
CODES = """
#include "cpu/grouped.h"
using W = Weights<BITS, half>;
template void rounded_tile<ROUNDED_ROWS>(const W &, Index, const Rounded &, Index, float *,
                                         const uint8_t *, int);
"""
PRODUCT = re.compile(r"\t(vfmadd\w+|vdpbf16ps)\s")
# Sums, rows times registers of sixteen columns: as many products, and twice where pairs have none.
PRODUCTS = {"avx2": 5 * 2 * 2, "avx512": 5 * 4 * 2, "avx512_bf16": 6 * 4}


def compiled(text: str, level: str, path: Path) -> str:
    """The machine code, in words."""
    path.write_text(text)
    includes = [word for folder in find_headers() for word in ("-I", folder)]
    command = [find_compiler("cpu"), "-std=c++20", "-O3", "-fPIC", *LEVELS[level].flags]
    command += [f'-DLEVEL="{level}"', "-I", str(SOURCES), *includes, "-S", str(path), "-o", "-"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return made.stdout


def hottest_loop(assembly: str, product: re.Pattern[str] = PRODUCT) -> list[str]:
    """The lines from a label to the jump back to it that hold the most products."""
    lines = assembly.splitlines()
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
    loops = []
    for i, line in enumerate(lines):
        jump = re.match(r"\tj\w+\s+(\.L\w+)", line)
        if jump and labels.get(jump[1], i) < i:
            loops.append(lines[labels[jump[1]] : i])
    return max(loops, key=lambda loop: sum(bool(product.match(line)) for line in loop))


def stores_to_stack(loop: list[str]) -> list[str]:
    return [line for line in loop if re.search(r",\s*-?\w*\(%r[sb]p\)$", line)]


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the machine code of x86")
@pytest.mark.parametrize("level", PRODUCTS)
def test_sums_of_a_tile_stay_in_registers(level: str, tmp_path: Path):
    """A vector wider than a register, or a row too many, would have them loaded and stored."""
    loop = hottest_loop(compiled(TILE, level, tmp_path / "tile.cpp"))
    assert sum(bool(PRODUCT.match(line)) for line in loop) == PRODUCTS[level]
    assert not stores_to_stack(loop)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="reads the machine code of x86")
@pytest.mark.parametrize("bits", [4, 8])
def test_dots_of_codes_stay_in_registers(bits: int, tmp_path: Path):
    """With AVX2, those of a block's 8 quads of inputs, of 5 rows, and of two registers of columns
    or, in 8 bits, of halves of codes. Two scales or minimums may be set aside behind them."""
    product = re.compile(r"\tvpmaddubsw\s")
    code = compiled(CODES.replace("BITS", str(bits)), "avx2", tmp_path / "codes.cpp")
    loop = hottest_loop(code, product)
    assert sum(bool(product.match(line)) for line in loop) == 8 * 5 * 2
    assert len(stores_to_stack([line for line in loop if "%ymm" in line])) <= 2
