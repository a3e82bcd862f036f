"""The CPU's implementations on every card's cases, native and, where nothing is built, without."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any
from unittest.mock import patch

import pytest
import torch

from minisgl import csrc
from minisgl.device.tape import calls_noted
from minisgl.kernels.advance import prepare_inputs
from minisgl.kernels.attention import attention
from minisgl.kernels.attention.paged import paged_case
from minisgl.kernels.cascade import cascade, cascade_case
from minisgl.kernels.decode import decode
from minisgl.kernels.embedding import embedding
from minisgl.kernels.grouped_linear.panels import GroupedPanels
from minisgl.kernels.linear import linear
from minisgl.kernels.linear.panels import LARGE, Panels, packed
from minisgl.kernels.matrix import unpacked
from minisgl.kernels.moe import moe_experts, moe_route_reference, packed_experts
from minisgl.kernels.op import Case, Op, all_ops
from minisgl.kernels.rmsnorm import rmsnorm
from tests.kernels.cards import check
from tests.world.levels import at, levels

NATIVE = csrc.load("model_ops", wait=True)
NATIVE_OPS = (
    "attention",
    "linear",
    "rmsnorm",
    "silu_and_mul",
    "gelu_tanh_and_mul",
    "qkv_prepare",
    "decode",
    "cascade",
    "prepare_inputs",
    "accept_and_advance",
    "moe_route",
    "embedding",
    "prepare_points",
    "prepare_proposals",
    "keep_proposals",
    "cap_logits",
    "adjust_logits",
    "mask_logits",
    "sample",
)


def _parameters() -> Iterator[object]:
    for op in all_ops():
        for implementation in op.implementations:
            if implementation.device != "cpu":
                continue
            native = levels() if op.name in NATIVE_OPS else []
            for case in op.cases:
                for dtype in (torch.float32, torch.bfloat16):
                    for level in (*native, pytest.param(None, id=implementation.name)):
                        label = f"{op.name}-{level.id}-{case.label}-{str(dtype)[6:]}"
                        values = (op, implementation.name, case, dtype, *level.values)
                        yield pytest.param(*values, id=label, marks=level.marks)


@pytest.mark.parametrize(("op", "name", "case", "dtype", "level"), list(_parameters()))
def test_case(op: Op, name: str, case: Case, dtype: torch.dtype, level: str | None) -> None:
    arguments = case.make(torch.device("cpu"), dtype, torch.Generator().manual_seed(0))
    with at(level):
        check(op, name, arguments)


def test_operands_that_are_not_dense() -> None:
    generator = torch.Generator().manual_seed(0)
    x, wide = torch.randn(3, 32, generator=generator), torch.randn(32, 2, generator=generator)
    weight, every_other = torch.randn(32, 32, generator=generator), wide[:, 0]
    assert not every_other.is_contiguous()
    expected = x @ weight.T + every_other
    assert torch.allclose(linear(x, weight, every_other), expected, atol=1e-5)
    expected = rmsnorm(x, every_other.clone(), 1e-6)
    assert torch.allclose(rmsnorm(x, every_other, 1e-6), expected, atol=1e-6)


def test_operands_that_do_not_fit_are_refused() -> None:
    x, weight = torch.ones(1, 8), torch.ones(32, 16)
    for matrix in (weight, packed(weight.bfloat16())):
        with pytest.raises(RuntimeError):
            linear(x if matrix is weight else x.bfloat16(), matrix)
    with pytest.raises(RuntimeError):
        linear(x, torch.ones(32, 8), torch.ones(2))
    with pytest.raises(RuntimeError):
        rmsnorm(x, torch.ones(3), 1e-6)


@pytest.mark.skipif(NATIVE is None, reason="no compiler: the reference serves")
def test_the_tokens_of_one_sequence_may_be_a_number_expanded() -> None:
    """As the first pass of a draft model over one row has it: the native op takes that."""

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    sequences = ints(0).expand(2)
    read = (ints(-1, 5), sequences, ints(0, 2), ints(1), ints(-1), ints(2), ints(7, 8), ints(3, 4))
    pages = torch.arange(8, dtype=torch.int32).view(2, 4)
    written = [ints(-7, -7), ints(-7, -7).long(), ints(-7, -7).long(), ints(-7)]
    with patch("minisgl.kernels.advance.cpu.prepare_inputs_twin", side_effect=AssertionError):
        prepare_inputs(*written, *read, pages, 2)
    assert [tensor.tolist() for tensor in written] == [[8, 5], [4, 5], [12, 13], [6]]


@pytest.mark.skipif(NATIVE is None, reason="no compiler: weights are not packed")
@pytest.mark.parametrize("level", [*levels(), None])
@pytest.mark.parametrize("case", linear.cases, ids=lambda case: case.label)
def test_packed_weights(case: Case, level: str | None) -> None:
    arguments = case.make(torch.device("cpu"), torch.bfloat16, torch.Generator().manual_seed(0))
    weight = arguments["weight"]
    arguments["weight"] = panels = packed(weight.clone())
    assert isinstance(panels, Panels) == (weight.shape[1] % 2 == 0)
    assert panels.shape == weight.shape
    assert torch.equal(unpacked(panels), weight)
    ids = torch.randint(len(weight), (5,))
    with at(level):
        assert torch.equal(embedding(ids, panels), weight[ids])
        part, some = (100, len(weight) - 1), ids.int() + 99  # ids before the part and within it
        expected = embedding.reference(some, weight, part, 0.75)
        assert torch.equal(embedding(some, panels, part, 0.75), expected)
        check(linear, "cpu", arguments)


@pytest.mark.skipif(NATIVE is None, reason="no compiler: weights are not packed")
def test_packing_takes_the_place_of_the_weight() -> None:
    weight = torch.ones(96, 64, dtype=torch.bfloat16)
    panels = packed(weight)
    assert isinstance(panels, Panels)
    assert panels.values.data_ptr() == weight.data_ptr()


def test_large_weights_are_packed_for_what_is_built_alone() -> None:
    """While it is built, unpacking a large weight in every step would cost more than the build."""
    small = torch.ones(64, 64, dtype=torch.bfloat16)
    large = torch.ones(LARGE // 128 + 1, 64, dtype=torch.bfloat16)
    waited = []

    def load(name: str, wait: bool) -> None:
        waited.append(wait)

    with (
        patch.object(csrc, "load", load),
        patch.object(csrc, "is_coming", side_effect=[True, False]),
    ):
        assert isinstance(packed(small), Panels)
        assert packed(large) is large  # its build has failed meanwhile
    assert waited == [False, True]


@pytest.mark.skipif(NATIVE is None, reason="no compiler: there is no native attention to test")
@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("facts", [{}, {"window": 300}, {"softcap": 20.0}], ids=str)
def test_a_query_has_one_result_in_any_chunk(facts: dict[str, Any], level: str) -> None:
    """Over three blocks of keys and two spans of queries."""
    generator = torch.Generator().manual_seed(0)
    facts = {"head_dim": 64, "q_heads": 4, "kv_heads": 2} | facts
    case = paged_case(700, [700], torch.device("cpu"), torch.bfloat16, generator, **facts)
    q, kv, offsets = case["q"], case["kv"], torch.tensor([0, 700], dtype=torch.int32)
    with at(level):
        check(attention, "cpu", case | {"cu_seqlens_q": offsets})
        whole = attention(q, kv, offsets)
        for start, end in ((0, 1), (0, 256), (5, 290), (255, 258), (511, 699), (699, 700)):
            own = kv._replace(seq_lens=torch.tensor([end], dtype=torch.int32))
            chunk = torch.tensor([0, end - start], dtype=torch.int32)
            assert torch.equal(attention(q[start:end], own, chunk), whole[start:end])


@pytest.mark.skipif(NATIVE is None, reason="no compiler: there is no native decode to test")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "facts", [{}, {"window": 300}, {"softcap": 20.0, "page_size": 1}, {"page_size": 7}], ids=str
)
def test_a_decoding_query_has_one_result_beside_any_other(
    dtype: torch.dtype, facts: dict[str, Any]
) -> None:
    """Three threads share the blocks of the longest sequence; one takes them in order."""
    generator, width, lengths = torch.Generator().manual_seed(0), 3, [3, 700, 257, 0]
    facts = {"head_dim": 64, "q_heads": 16, "kv_heads": 4} | facts
    case = paged_case(12, lengths, torch.device("cpu"), dtype, generator, **facts)
    q, kv, before = case["q"], case["kv"], torch.get_num_threads()
    try:
        for threads in (3, 1):
            torch.set_num_threads(threads)
            check(decode, "cpu", case | {"width": width, "return_lse": True})
            together = decode(q, kv, width=width, return_lse=True)
            for row in range(width * 3):
                length = max(lengths[row // width] - width + 1 + row % width, 0)
                own = kv._replace(
                    rows=kv.rows[row // width : row // width + 1],
                    seq_lens=torch.tensor([length], dtype=torch.int32),
                )
                torch.set_num_threads(4 - threads)
                alone = decode(q[row : row + 1], own, width=1, return_lse=True)
                assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, together, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("group", range(1, 17))
def test_decode_with_a_group_of_any_size(group: int) -> None:
    generator = torch.Generator().manual_seed(group)
    facts = {"head_dim": 32, "q_heads": 3 * group, "kv_heads": 3}
    case = paged_case(4, [40, 300], torch.device("cpu"), torch.bfloat16, generator, **facts)
    check(decode, "cpu", case | {"width": 2})
    shared = cascade_case("", [300, 270, 290], [(0, 3, 16)], width=2, **facts)
    check(cascade, "cpu", shared.make(torch.device("cpu"), torch.bfloat16, generator))


@pytest.mark.skipif(NATIVE is None, reason="no compiler: there is no native decode to test")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("shape", "facts"),
    [
        ((6, 2), {"page_size": 1, "width": 2}),
        ((16, 1), {"softcap": 20.0}),
        ((3, 3), {"page_size": 7}),
        ((40, 1), {"page_size": 64}),
    ],
    ids=str,
)
def test_groups_change_no_bit_and_are_read_at_their_first_sequence(
    shape: tuple[int, int], facts: dict[str, Any], threads: int, level: str, dtype: torch.dtype
) -> None:
    """Groups that share 3, 2 and no whole blocks of 256 keys, and sequences that share nothing."""
    width = facts.get("width", 1)
    size = facts.get("page_size", 16)
    pages = [800 // size, 515 // size, 250 // size]
    least = [count * size + width for count in pages]
    lengths = [300, *(least[0] + n for n in (0, 7, 200, 1)), *(least[1] + n for n in (255, 0))]
    lengths += [0, *(least[2] + n for n in (40, 0)), 257]
    groups = [(1, 4, pages[0]), (5, 2, pages[1]), (0, 0, 0), (8, 2, pages[2])]
    case = cascade_case(
        "", lengths, groups, head_dim=32, q_heads=shape[0], kv_heads=shape[1], **facts
    )
    made = case.make(torch.device("cpu"), dtype, torch.Generator().manual_seed(0))
    made["return_lse"] = True
    kv, before = made["kv"], torch.get_num_threads()
    q = made.pop("q")
    plain = {name: made[name] for name in made if name not in ("groups", "shared")}
    apart = kv.page_table.clone()
    for first, count, shared in groups:
        apart[kv.rows[first + 1 : first + count].long(), : shared * size // 256 * 256 // size] = 0
    try:
        torch.set_num_threads(threads)
        with at(level), calls_noted() as calls:
            expected = decode(q, **plain)
            got = cascade(q, **made | {"kv": kv._replace(page_table=apart)})
    finally:
        torch.set_num_threads(before)
    assert not calls
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_cascade_refuses_a_window() -> None:
    made = cascade.cases[0].make(torch.device("cpu"), torch.float32, torch.Generator())
    windowed = made | {"kv": made["kv"]._replace(window=4)}
    for name in ("reference", "cpu"):
        with pytest.raises(ValueError, match="cascade needs attention without a window, got 4"):
            cascade.implementation(name)(**windowed)


@pytest.mark.skipif(NATIVE is None, reason="no compiler: there is no native linear layer to test")
@pytest.mark.parametrize(
    ("dtype", "pack"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
@pytest.mark.parametrize("level", levels())
def test_a_token_has_one_result_in_any_batch(dtype: torch.dtype, pack: bool, level: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(350 if pack else 150, 300, generator=generator).to(dtype)
    weight = torch.randn(501, 300, generator=generator).to(dtype)
    weight = packed(weight) if pack else weight
    with at(level):
        whole = linear(x, weight)
        for start, end in ((0, 1), (3, 5), (7, 23), (100, 150)):
            assert torch.equal(linear(x[start:end], weight), whole[start:end])


@pytest.mark.skipif(NATIVE is None, reason="no compiler: experts are not packed")
@pytest.mark.parametrize("level", [*levels(), None])
@pytest.mark.parametrize("case", moe_experts.cases, ids=lambda case: case.label)
def test_packed_experts(case: Case, level: str | None) -> None:
    arguments = case.make(torch.device("cpu"), torch.bfloat16, torch.Generator().manual_seed(0))
    whole = deepcopy((arguments["gate_up"], arguments["down"]))
    gates, down = packed_experts(arguments["gate_up"], arguments["down"])
    for was, made in zip(whole, (gates, down), strict=True):
        assert isinstance(made, Panels if torch.is_tensor(was) else GroupedPanels)
        assert torch.equal(unpacked(made).reshape(was.shape), unpacked(was))
    with at(level):
        check(moe_experts, "cpu", arguments | {"gate_up": gates, "down": down})


@pytest.mark.skipif(NATIVE is None, reason="no compiler: experts are not packed")
def test_experts_of_an_odd_size_stay_as_they_are() -> None:
    case = moe_experts.cases[0].make(torch.device("cpu"), torch.bfloat16, torch.Generator())
    odd = case | {"gate_up": case["gate_up"][:, :62].clone(), "down": case["down"][..., :31]}
    gate_up, down = packed_experts(odd["gate_up"], odd["down"])
    assert isinstance(gate_up, Panels)
    assert down is odd["down"]
    check(moe_experts, "cpu", odd | {"gate_up": gate_up, "down": down})


@pytest.mark.skipif(NATIVE is None, reason="no compiler: there is nothing native to test")
@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("threads", [1, 3])
def test_a_token_has_one_result_of_its_experts_in_any_batch(level: str, threads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, experts, hidden, inner = 90, 7, 200, 136

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    x, logits = normal(tokens, hidden), normal(tokens, experts)
    weights = packed_experts(normal(experts, 2 * inner, hidden), normal(experts, hidden, inner))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with at(level):
            chosen = moe_route_reference(logits, 3, True)
            whole = moe_experts(x, *weights, *chosen)
            for start, end in ((0, 1), (3, 5), (7, 23), (60, 90)):
                own = (part[start:end] for part in chosen)
                assert torch.equal(moe_experts(x[start:end], *weights, *own), whole[start:end])
    finally:
        torch.set_num_threads(before)
