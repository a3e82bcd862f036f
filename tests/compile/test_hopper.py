"""The Gluon kernel's barriers and overlap, in the code made of it: no interpreter runs Gluon."""

import re
from typing import Any

import pytest
import torch

from minisgl.kernels.attention import attention
from minisgl.kernels.attention.hopper import BLOCK_N, STAGES, attention_hopper
from minisgl.kernels.offline import recorded
from minisgl.kernels.op import Implementation, Op
from tools.machine_code import machine_code

CALLS = {case.label: case for case in attention.variants["hopper"]}
HEAD_BYTES = 2 * 128  # of one key

STEPS = {
    "wait": r"mbarrier\.try_wait",
    "expect": r"mbarrier\.arrive\.expect_tx\S* _, \[\S+\], (\d+);",
    "copy": r"cp\.async\.bulk\.tensor",
    "product": r"wgmma\.mma_async",
    "drain": r"wgmma\.wait_group\S* (\d+)",
    "meet": r"bar\.sync\s+0, 256",
    "free": r"mbarrier\.arrive\.shared",
}


def compiled(page_size: int) -> Any:
    call, generator = CALLS[f"page{page_size}"], torch.Generator().manual_seed(0)
    with recorded(90) as launched:
        attention_hopper(**call.make(torch.device("meta"), torch.bfloat16, generator))
    (variant,) = launched.values()
    return variant.compile()


def steps(page_size: int) -> list[tuple[str, int]]:
    """The synchronising instructions of a kernel, in the order of its text, with their number."""
    found = []
    for line in compiled(page_size).asm["ptx"].splitlines():
        for name, pattern in STEPS.items():
            if match := re.search(pattern, line):
                found.append((name, int(match[1]) if match.groups() else 0))
                break
    return found


@pytest.mark.parametrize("page_size", [16, 64])
def test_stages_are_filled_and_freed_as_they_must(page_size):
    found = steps(page_size)
    names = [name for name, _ in found]
    # A stage is free once all of the 8 warps that read it have their products: they meet between.
    for at in (at for at, name in enumerate(names) if name == "free"):
        drained = max(i for i in range(at) if names[i] == "drain")
        assert names[drained + 1 : at] == ["meet"], names[drained:at]
    # Keys before the loops, then keys and values in each: of whole tiles, and of masked ones.
    assert names.count("free") == 5
    # A barrier expects what is then copied: boxes of a page's part of a tile, in two halves.
    boxes = BLOCK_N // min(page_size, BLOCK_N) * 2
    expected = [i for i, name in enumerate(names) if name == "expect"]
    assert len(expected) == 2  # keys, values
    for at in expected:
        assert found[at][1] == BLOCK_N * HEAD_BYTES
        assert names[at - 1] == "wait"  # for the stage to be free
        assert names[at + 1 : at + 1 + boxes] == ["copy"] * boxes
    # Scores are taken while the products with the values before them are still on their way.
    assert ("drain", 2) in found
    assert STAGES == 2


@pytest.mark.parametrize("page_size", [16, 64])
def test_weights_are_computed_while_products_run(page_size):
    """In machine code, not in PTX: ptxas may move the wait for the products."""
    found, since = [], None
    for line in machine_code(compiled(page_size)).splitlines():
        if wait := re.search(r"WARPGROUP\.DEPBAR\S* gsb0, 0x(\d)", line):
            if since is not None and wait[1] == "0":
                found.append(since)
            since = 0 if wait[1] == "2" else None
        elif since is not None and "MUFU.EX2" in line:
            since += 1
    assert len(found) == 2  # the loops of whole tiles and of masked ones
    rows = 2  # of a thread, each with weights and a factor for what came before
    assert found == [rows * (BLOCK_N // 4 + 1)] * 2


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
