"""The tables, the roofline and the bars of a run."""

import importlib.util
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # which imports torch: a check without it can say so
    from benchmarks.kernels.timing import Ceilings

Row = dict[str, Any]


def table(rows: list[Row], ceilings: "Ceilings") -> str:
    """Markdown: one line per workload and implementation, ratios to what a user would pick."""
    lines = [
        "| op | shape | kernel | us | graph | GB/s | of copy | TFLOP/s | of matmul | faster than |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
        memory = row["bytes_per_second"] / ceilings.bytes_per_second
        compute = row["flops_per_second"] / ceilings.flops_per_second
        short = row["graph_seconds"]
        in_graph = "" if short is None else f"{short * 1e6:.1f}"
        lines.append(
            f"| {row['op']} | {row['label']} | {row['implementation']} "
            f"| {row['seconds'] * 1e6:.1f} | {in_graph} "
            f"| {row['bytes_per_second'] / 1e9:.0f} | {memory:.0%} "
            f"| {row['flops_per_second'] / 1e12:.2f} | {compute:.0%} | {ratios} |"
        )
    return "\n".join(lines)


def goal_table(verdicts: list[Row]) -> str:
    """Markdown: met, short, or not measured and why; beside what was predicted."""
    lines = ["| goal | target | predicted | measured | |", "|---|---:|---:|---:|---|"]
    for verdict in verdicts:
        measured, unit = verdict["measured"], verdict["unit"]
        shown = "" if measured is None else f"{measured:.3g} {unit}"
        state = ": ".join(filter(None, (verdict["state"], verdict["why"])))
        target = "" if verdict["target"] is None else f"{verdict['target']:g} {unit}"
        lines.append(
            f"| {verdict['goal']} | {target} "
            f"| {prediction(verdict['predicted'])} | {shown} | {state} |"
        )
    return "\n".join(lines)


def prediction(bounds: Sequence[float] | None) -> str:
    """ "2.65-2.9", or nothing."""
    return "" if bounds is None else "-".join(f"{bound:g}" for bound in dict.fromkeys(bounds))


def plot(rows: list[Row], ceilings: "Ceilings", title: str, folder: Path) -> list[Path]:
    """roofline.png and ratios.png in `folder`; no pictures where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        print("no pictures: matplotlib is not installed")
        return []
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    paths = [folder / "roofline.png", folder / "ratios.png"]
    figure, axes = plt.subplots(figsize=(8, 5))
    intensities = [2.0**e for e in range(-4, 13)]
    roof = [
        min(ceilings.flops_per_second, i * ceilings.bytes_per_second) / 1e12 for i in intensities
    ]
    axes.plot(intensities, roof, color="black", label="measured copy and matmul")
    for op in dict.fromkeys(row["op"] for row in rows):
        own = [row for row in rows if row["op"] == op and row["flops"] and row["bytes"]]
        x = [row["flops"] / row["bytes"] for row in own]
        axes.scatter(x, [row["flops_per_second"] / 1e12 for row in own], s=16, label=op)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s", title=title)
    axes.legend(fontsize=7)
    figure.savefig(paths[0], dpi=120, bbox_inches="tight")
    plt.close(figure)

    bars: dict[str, list[float]] = {}
    for row in rows:
        for name, ratio in row["ratios"].items():
            bars.setdefault(f"{row['op']} ({row['implementation']}) / {name}", []).append(ratio)
    means = [statistics.geometric_mean(ratios) for ratios in bars.values()]
    reach = [
        [max(mean - min(ratios), 0.0) for mean, ratios in zip(means, bars.values(), strict=True)],
        [max(max(ratios) - mean, 0.0) for mean, ratios in zip(means, bars.values(), strict=True)],
    ]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(bars)))
    axes.barh(list(bars), means, xerr=reach, error_kw={"linewidth": 0.8})
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="times as fast: mean, least and most of all shapes", title=title)
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    figure.savefig(paths[1], dpi=120, bbox_inches="tight")
    plt.close(figure)
    return paths
