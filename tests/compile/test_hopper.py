"""The Gluon kernel's barriers and overlap, in the code made of it: no interpreter runs Gluon."""

import re
from functools import cache
from typing import Any

import pytest
import torch

from minisgl.kernels.attention import attention
from minisgl.kernels.attention.hopper import (
    BLOCK_N,
    CONSUMER_REGISTERS,
    STAGES,
    attention_hopper,
)
from minisgl.kernels.offline import recorded
from minisgl.kernels.op import Implementation, Op
from tools.machine_code import machine_code

CALLS = {case.label: case for case in attention.variants["hopper"]}
HEAD_BYTES = 2 * 128  # of one key
QK, PV = BLOCK_N // 16, 2 * BLOCK_N // 16  # products of 16 columns of a head, or keys, in a tile

# Synchronising instructions, with their number where they have one: in PTX, and in machine code.
STEPS = {
    "wait": r"mbarrier\.try_wait",
    "expect": r"mbarrier\.arrive\.expect_tx\S* _, \[\S+\], (\d+);",
    "copy": r"cp\.async\.bulk\.tensor",
    "product": r"wgmma\.mma_async",
    "drain": r"wgmma\.wait_group\S* (\d+)",
    "meet": r"bar\.sync\s+[0-3], 128",
    "turn": r"bar\.sync\s+([4-9]|1\d), 256",
    "pass": r"bar\.arrive\s+(\d+), 256",
    "free": r"mbarrier\.arrive\.shared",
}
MACHINE = {
    "exponential": r"MUFU\.EX2",
    "product": r"HGMMA",
    "drain": r"WARPGROUP\.DEPBAR\S* gsb0, (0x\d+)",
    "turn": r"BAR\.SYNC\S* (0x[4-9a-f]), 0x100",
    "pass": r"BAR\.ARV (0x\w+), 0x100",
}


@cache
def compiled(page_size: int) -> Any:
    call, generator = CALLS[f"page{page_size}"], torch.Generator().manual_seed(0)
    with recorded(90) as launched:
        attention_hopper(**call.make(torch.device("meta"), torch.bfloat16, generator))
    listing, kernel = launched.values()
    assert (listing.name, kernel.name) == ("tile_list_kernel", "attention_hopper_kernel")
    return kernel.compile()


def steps(code: str, patterns: dict[str, str]) -> list[tuple[str, int]]:
    """The instructions of a kernel that match, in the order of its text, with their number."""
    found = []
    for line in code.splitlines():
        for name, pattern in patterns.items():
            if match := re.search(pattern, line):
                found.append((name, int(match[1], 0) if match.groups() else 0))
                break
    return found


@pytest.mark.parametrize("page_size", [16, 64])
def test_stages_are_filled_and_freed_as_they_must(page_size):
    ptx = compiled(page_size).asm["ptx"]
    # Full when the producer's bytes are there, empty when both consumers say so: keys and values.
    counts = re.findall(r"mbarrier\.init\S* \[\S+\], (\d+);", ptx)
    assert sorted(counts) == ["1"] * 2 * STAGES + ["2"] * 2 * STAGES
    found = steps(ptx, STEPS)
    names = [name for name, _ in found]
    # A consumer is done with a stage once its 4 warps have their products: they meet between.
    for at in (at for at, name in enumerate(names) if name == "free"):
        drained = max(i for i in range(at) if names[i] == "drain")
        assert names[drained + 1 : at] == ["meet"], names[drained:at]
    # Of each consumer: keys before the loops, keys and values in each, of whole tiles and of masked
    # ones, and values after them.
    assert names.count("free") == 2 * 6
    # A barrier expects what is then copied: boxes of a page's part of a tile, in two halves.
    boxes = BLOCK_N // min(page_size, BLOCK_N) * 2
    expected = [i for i, name in enumerate(names) if name == "expect"]
    assert len(expected) == 2  # keys, values
    for at in expected:
        assert found[at][1] == BLOCK_N * HEAD_BYTES
        assert names[at - 1] == "wait"  # for the stage to be free
        assert names[at + 1 : at + 1 + boxes] == ["copy"] * boxes
    assert STAGES == 2


def turns(found: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """From each turn to passing it."""
    begins = [i for i, (name, _) in enumerate(found) if name == "turn"]
    ends = (next(j for j in range(i, len(found)) if found[j][0] == "pass") for i in begins)
    return [found[i : j + 1] for i, j in zip(begins, ends, strict=True)]


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize(("form", "patterns"), [("ptx", STEPS), ("machine", MACHINE)])
def test_products_are_issued_in_turns(page_size, form, patterns):
    """And none is waited for: not for its result, which would serialise them, nor to pass on."""
    made = compiled(page_size)
    found = steps(made.asm["ptx"] if form == "ptx" else machine_code(made), patterns)
    passes = [number for name, number in found if name == "pass"]
    assert sorted(passes) == [8] * 4 + [9] * 3  # consumer 0 begins, by passing to itself
    assert sum(name == "turn" for name, _ in found) == 6
    for (_, mine), *inside, (_, other) in turns(found):
        assert (mine, other) in ((8, 9), (9, 8))
        names = [name for name, _ in inside if name != "wait"]  # for values, within the turn
        assert names in (["product"] * QK, ["product"] * (QK + PV)), names
    issued = sum(len([1 for name, _ in turn if name == "product"]) for turn in turns(found))
    assert issued == 2 * (QK + 2 * (QK + PV))  # of each: the first tile, and one of each loop
    assert sum(name == "product" for name, _ in found) == issued + 2 * PV  # the last, outside


@pytest.mark.parametrize("page_size", [16, 64])
def test_weights_are_computed_while_products_run(page_size):
    """In machine code, not in PTX: ptxas may move the wait for the products."""
    found, since = [], None
    for name, number in steps(machine_code(compiled(page_size)), MACHINE):
        if name == "drain":
            if since is not None and number == 0:
                found.append(since)
            since = 0 if number == 2 else None
        elif since is not None and name == "exponential":
            since += 1
    rows = 2  # of a thread, each with weights and a factor for what came before
    # Of each consumer the loops of whole tiles and of masked ones.
    assert found == [rows * (BLOCK_N // 4 + 1)] * 4


@pytest.mark.parametrize("page_size", [16, 64])
def test_consumers_stay_within_their_registers(page_size):
    """The launch's are shared out anew: what a launch reports is not what a consumer has."""
    code = machine_code(compiled(page_size))
    assert max(int(number) for number in re.findall(r"\bR(\d+)", code)) < CONSUMER_REGISTERS.value
    assert not re.search(r"\b(LDL|STL)\b", code)


def test_what_it_serves_is_said_on_its_card():
    """Of the cases of attention: heads of 128 in 16 bits, on pages of 16 tokens or more, bare."""
    (hopper,) = (i for i in attention.implementations if i.name == "hopper")
    generator = torch.Generator().manual_seed(0)
    served = [
        (case.label, dtype)
        for case in attention.cases
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        if hopper.refusal(**case.make(torch.device("cpu"), dtype, generator)) is None
    ]
    labels = ("chunks-D128", "empty-sequence", "lse-D128")
    halves = (torch.float16, torch.bfloat16)
    assert served == [(label, dtype) for label in labels for dtype in halves]


def test_meta_tensors_stand_for_the_gpu_that_launchers_configure_for():
    """Its instructions are Hopper's alone; what is chosen for one GPU is not kept for another."""
    (hopper,) = (i for i in attention.implementations if i.name == "hopper")
    meta, path = torch.device("meta"), "minisgl.kernels.activation.portable"
    card = Op(
        "gated",
        attention.reference,
        [
            Implementation("hopper", "cuda", f"{path}:gelu_tanh_and_mul_portable", (9, 0)),
            Implementation("portable", "cuda", f"{path}:silu_and_mul_portable"),
        ],
    )
    for arch in (80, 90, 100):
        with recorded(arch) as launched:
            assert hopper.supports(meta) == (arch == 90)
            card(torch.empty(2, 64, device=meta))
        assert [variant.facts["GELU"] for variant in launched.values()] == [arch == 90]
