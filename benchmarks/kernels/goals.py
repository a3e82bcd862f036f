"""The figures that this project means to reach, and whether a run has reached them."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.kernels.attention_work import RAGGED
from benchmarks.kernels.timing import Ceilings

Row = dict[str, Any]
MIB = 2**20


Range = tuple[float, float]


@dataclass(frozen=True)
class Goal:
    """A floor (or with `at_most` a ceiling) for a figure that `of` reads from a run's rows.

    Where `target` is None the figure was only predicted.
    """

    name: str
    unit: str
    target: float | None
    of: Callable[[list[Row], Ceilings], float | None]
    op: str  # whose rows it reads
    implementation: str | None = None  # the only one whose rows it reads
    stretch: float | None = None
    at_most: bool = False
    predicted: Range | None = None  # before anything had run on such a GPU, from its machine code

    def is_of(self, ways: Collection[tuple[str, str]]) -> bool:
        """Whether a run of these (op, implementation) can measure it."""
        if self.implementation is not None:
            return (self.op, self.implementation) in ways
        return any(op == self.op for op, _ in ways)

    def verdict(self, rows: list[Row], ceilings: Ceilings, missing: Sequence[str] = ()) -> Row:
        """`missing`: why workloads or implementations have no row, "op shape: why"."""
        value, why = self.of(rows, ceilings), ""
        if value is None:
            state = "not measured"
            why = next((m for m in missing if m.startswith(self.op)), f"no such row of {self.op}")
        else:
            state = self._judge(value)
        return {
            "goal": self.name,
            "unit": self.unit,
            "target": self.target,
            "stretch": self.stretch,
            "predicted": self.predicted,
            "measured": value,
            "state": state,
            "why": why,
        }

    def _judge(self, value: float) -> str:
        if self.target is None:
            return "measured"
        if self.stretch is not None and value >= self.stretch:
            return "stretch met"
        met = value <= self.target if self.at_most else value >= self.target
        return "met" if met else "short"


# What a filter may take, in reads of the logits, and what an H100 was predicted to take for it.
FILTERS: dict[str, tuple[float, Range | None]] = {
    "greedy": (1.2, (1.3, 1.5)),
    "temperature": (1.6, (2.6, 3.6)),
    "top-p, few tokens": (2.5, (5.0, 8.0)),
    "top-p": (5.0, (15, 27)),  # most rows need more tokens than are gathered: twice as many reads
    "top-k top-p": (2.5, None),
    "min-p": (2.5, None),
}
# An op's share of the copy rate as predicted for an H100: from 4k tokens on, and at 16k.
COPY_SHARES: dict[str, tuple[Range | None, Range | None]] = {
    "rmsnorm": (None, (0.88, 0.93)),
    "qkv_prepare": ((0.78, 0.88), None),
    "silu_and_mul": (None, (0.88, 0.93)),
}

# The same of products with weights in codes, by their bits and the tokens.
CODES_SHARES: tuple[tuple[int, int, Range], ...] = (
    (4, 1, (0.4, 0.6)),
    (8, 1, (0.65, 0.85)),
    (4, 16, (0.35, 0.5)),
    (8, 16, (0.5, 0.75)),
)
CODES_RATES: dict[int, Range] = {4: (280, 400), 8: (250, 380)}  # TFLOP/s of 4k tokens


def goals(device_name: str) -> list[Goal]:
    """Those of an H200 where the device is one, else those of an H100; bf16, head size 128."""
    h200 = "H200" in device_name.split()
    listed = [
        Goal(
            "decode, GQA, >= 256 MB of KV",
            "TB/s",
            3.6 if h200 else 2.5,
            lambda rows, _: _best(_big_decodes(rows), "bytes_per_second", 1e12),
            "decode",
            stretch=4.0 if h200 else 2.8,
            predicted=(3.8, 4.15) if h200 else (2.65, 2.9),  # by its faster memory
        ),
        _predicted("decode, batch 1 at 8k, of that", "x", (0.5, 0.6), _decode_share(1, 8192)),
        _predicted("decode, ragged, of that", "x", (0.1, 0.3), _decode_share(64, RAGGED)),
        Goal("decode, page 16 over the best of 1, 16 and 64", "x", 0.95, _default_page, "decode"),
        Goal(
            "chunks, causal 4 x 8k, Triton",
            "TFLOP/s",
            400,
            _prefill("portable"),
            "attention",
            "portable",
            predicted=(330, 420),
        ),
        Goal(
            "chunks, causal 4 x 8k, Gluon",
            "TFLOP/s",
            600,
            _prefill("hopper"),
            "attention",
            "hopper",
            stretch=650,
            predicted=(600, 660),
        ),
        Goal("chunks, causal 4 x 8k, best over cuDNN SDPA", "x", 1.0, _over_cudnn, "attention"),
        Goal("paged prefix, shuffled over in order", "x", 0.9, _paged_over_dense, "attention"),
    ]
    for name, (target, predicted) in FILTERS.items():
        listed.append(
            Goal(
                f"sampling 256 x 152k, {name}, over one read of the logits",
                "x",
                target,
                _sampling(name),
                "sample",
                at_most=True,
                predicted=predicted,
            )
        )
    for op, (many, most) in COPY_SHARES.items():
        share = f"{op}, >= 4k tokens, of the copy rate"
        listed.append(Goal(share, "x", 0.85, _copy_share(op, 4096), op, predicted=many))
        if most is not None:
            whole = f"{op}, 16k tokens, of the copy rate"
            listed.append(Goal(whole, "x", 0.85, _copy_share(op, 16384), op, predicted=most))
        few = f"{op}, <= 64 tokens, in a graph"
        listed.append(Goal(few, "us", 4.0, _few_tokens(op), op, at_most=True))
    return [
        *listed,
        Goal(
            "cascade, 4k shared prefix, batch 64",
            "x",
            3.0,
            _cascade,
            "cascade",
            predicted=(6.0, 8.0),
        ),
        _predicted("merge, 16 and 32 runs, in a graph", "us", (2, 3), _merge, "merge"),
        _predicted(
            "experts, 16 tokens, of the copy rate", "x", (0.8, 0.88), _experts, "moe_experts"
        ),
        _predicted(
            "experts, 4k tokens",
            "TFLOP/s",
            (280, 380),
            lambda rows, _: _best(_experts_rows(rows, 4096), "flops_per_second", 1e12),
            "moe_experts",
        ),
        *(
            _predicted(
                f"codes of {bits} bits, batch {tokens}, of the copy rate",
                "x",
                predicted,
                _codes_share(bits, tokens),
                "grouped_linear",
            )
            for bits, tokens, predicted in CODES_SHARES
        ),
        *(
            _predicted(
                f"codes of {bits} bits, 4k tokens",
                "TFLOP/s",
                predicted,
                _codes_rate(bits),
                "grouped_linear",
            )
            for bits, predicted in CODES_RATES.items()
        ),
    ]


def _predicted(
    name: str,
    unit: str,
    predicted: Range,
    of: Callable[[list[Row], Ceilings], float | None],
    op: str = "decode",
) -> Goal:
    return Goal(name, unit, None, of, op, predicted=predicted)


def _best(rows: Iterable[Row], key: str, unit: float) -> float | None:
    return max((row[key] / unit for row in rows), default=None)


def _ours(rows: list[Row], op: str, implementation: str | None = None) -> list[Row]:
    return [
        row for row in rows if row["op"] == op and implementation in (None, row["implementation"])
    ]


def _big_decodes(rows: list[Row]) -> list[Row]:
    return [
        row
        for row in _ours(rows, "decode")
        if row["tags"]["kv_bytes"] >= 256 * MIB and row["tags"]["width"] == 1
    ]


def _default_page(rows: list[Row], _: Ceilings) -> float | None:
    """The smallest ratio over the batches measured with all three."""
    seconds: dict[tuple[str, int, int], dict[int, float]] = {}
    for row in _big_decodes(rows):
        tags = row["tags"]
        own = seconds.setdefault((tags["model"], tags["batch"], tags["context"]), {})
        own[tags["page_size"]] = row["seconds"]
    whole = [own for own in seconds.values() if own.keys() >= {1, 16, 64}]
    return min((min(own.values()) / own[16] for own in whole), default=None)


def _decode_share(batch: int, context: int) -> Callable[[list[Row], Ceilings], float | None]:
    """The rate of this decode over the best of the large ones."""
    wanted = {"batch": batch, "context": context, "model": "Llama-3.1-8B", "width": 1}

    def share(rows: list[Row], _: Ceilings) -> float | None:
        best = _best(_big_decodes(rows), "bytes_per_second", 1.0)
        own = [row for row in _ours(rows, "decode") if wanted.items() <= row["tags"].items()]
        rate = _best(own, "bytes_per_second", 1.0)
        return None if best is None or rate is None else rate / best

    return share


def _whole_prefills(rows: list[Row], implementation: str | None = None) -> list[Row]:
    wanted = {"count": 4, "queries": 8192, "length": 8192}
    return [
        row
        for row in _ours(rows, "attention", implementation)
        if wanted.items() <= row["tags"].items()
    ]


def _prefill(implementation: str) -> Callable[[list[Row], Ceilings], float | None]:
    return lambda rows, _: _best(_whole_prefills(rows, implementation), "flops_per_second", 1e12)


def _over_cudnn(rows: list[Row], _: Ceilings) -> float | None:
    ratios = [row["ratios"].get("SDPA cuDNN") for row in _whole_prefills(rows)]
    return max((ratio for ratio in ratios if ratio is not None), default=None)


def _paged_over_dense(rows: list[Row], _: Ceilings) -> float | None:
    """The smallest ratio over the implementations that ran both."""
    ratios = []
    extended = [row for row in _ours(rows, "attention") if row["tags"]["length"] == 9216]
    for name in {row["implementation"] for row in extended}:
        own = {r["tags"]["shuffled"]: r["seconds"] for r in extended if r["implementation"] == name}
        if len(own) == 2:
            ratios.append(own[False] / own[True])
    return min(ratios, default=None)


def _sampling(name: str) -> Callable[[list[Row], Ceilings], float | None]:
    """A filter's time over the time to read the logits once."""
    wanted = {"rows": 256, "filter": name}

    def reads(rows: list[Row], ceilings: Ceilings) -> float | None:
        own = [r for r in _ours(rows, "sample", "portable") if wanted.items() <= r["tags"].items()]
        times = [row["seconds"] / (row["bytes"] / ceilings.bytes_per_second) for row in own]
        return max(times, default=None)

    return reads


def _copy_share(op: str, least: int) -> Callable[[list[Row], Ceilings], float | None]:
    def share(rows: list[Row], ceilings: Ceilings) -> float | None:
        many = [row for row in _ours(rows, op, "portable") if row["tags"]["tokens"] >= least]
        rates = [row["bytes_per_second"] / ceilings.bytes_per_second for row in many]
        return min(rates, default=None)

    return share


def _few_tokens(op: str) -> Callable[[list[Row], Ceilings], float | None]:
    """Within a graph: at a few microseconds a launch by itself would be most of what is seen."""

    def microseconds(rows: list[Row], _: Ceilings) -> float | None:
        few = [row for row in _ours(rows, op, "portable") if row["tags"]["tokens"] <= 64]
        times = [row["graph_seconds"] * 1e6 for row in few if row["graph_seconds"] is not None]
        return max(times, default=None)

    return microseconds


def _cascade(rows: list[Row], _: Ceilings) -> float | None:
    wanted = {"batch": 64, "shared": 4096}
    ours = [row for row in _ours(rows, "cascade") if wanted.items() <= row["tags"].items()]
    ratios = [row["ratios"].get("plain decode") for row in ours]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def _merge(rows: list[Row], _: Ceilings) -> float | None:
    ours = [row for row in _ours(rows, "merge") if row["tags"]["states"] >= 16]
    times = [row["graph_seconds"] * 1e6 for row in ours if row["graph_seconds"] is not None]
    return max(times, default=None)


def _experts_rows(rows: list[Row], tokens: int) -> list[Row]:
    return [row for row in _ours(rows, "moe_experts") if row["tags"]["tokens"] == tokens]


def _experts(rows: list[Row], ceilings: Ceilings) -> float | None:
    rate = _best(_experts_rows(rows, 16), "bytes_per_second", 1.0)
    return None if rate is None else rate / ceilings.bytes_per_second


def _codes_rows(rows: list[Row], bits: int, tokens: int) -> list[Row]:
    wanted = {"bits": bits, "tokens": tokens}
    return [row for row in _ours(rows, "grouped_linear") if wanted.items() <= row["tags"].items()]


def _codes_share(bits: int, tokens: int) -> Callable[[list[Row], Ceilings], float | None]:
    def share(rows: list[Row], ceilings: Ceilings) -> float | None:
        rate = _best(_codes_rows(rows, bits, tokens), "bytes_per_second", 1.0)
        return None if rate is None else rate / ceilings.bytes_per_second

    return share


def _codes_rate(bits: int) -> Callable[[list[Row], Ceilings], float | None]:
    return lambda rows, _: _best(_codes_rows(rows, bits, 4096), "flops_per_second", 1e12)
