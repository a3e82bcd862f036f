"""The step timeline as figures and as a picture: what the device waits for, what overlap hides.

    python -m profiles.timeline                       # the bundled model, overlap on and off
    python -m profiles.timeline --shape qwen3-0.6b --batch 16 --out profiles/out
    python -m profiles.timeline --file PROFILE_DIR/20261121-093000/timeline.json

Prints a table, then one line of JSON; writes timeline.png and the timelines it made to --out. The
picture shows --window consecutive steps from the middle.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.intervals import Interval, covered, merge
from profiles import workload

DEVICE_PARTS = ("forward", "sample")
HOST_PARTS = ("plan", "dispatch", "masks", "update")  # what the planner does besides waiting
COLORS = {
    "plan": "#4477aa",
    "dispatch": "#66ccee",
    "masks": "#ee6677",
    "collect": "#dddddd",
    "update": "#228833",
    "forward": "#ccbb44",
    "sample": "#aa3377",
}


@dataclass(frozen=True)
class Span:
    """Times in microseconds."""

    name: str
    step: int
    begin: float
    end: float


def read(file: Path) -> tuple[str, list[Span]]:
    """What was profiled and its spans, by time. ValueError when the file is no step timeline."""
    try:
        events = json.loads(file.read_text())["traceEvents"]
        title = next(e["args"]["name"] for e in events if e["name"] == "process_name")
        spans = [
            Span(e["name"], e["args"]["step"], e["ts"], e["ts"] + e["dur"])
            for e in events
            if e["ph"] == "X"
        ]
    except (ValueError, LookupError, TypeError, StopIteration) as error:
        raise ValueError(f"{file} is not a step timeline: {error!r}") from error
    if not any(span.name in DEVICE_PARTS for span in spans):
        raise ValueError(f"{file} holds no step of the device")
    return title, sorted(spans, key=lambda span: span.begin)


def figures(spans: Sequence[Span]) -> dict[str, float]:
    """Medians and shares over all steps; times in microseconds."""
    busy = merge([(s.begin, s.end) for s in spans if s.name in DEVICE_PARTS])
    host = merge([(s.begin, s.end) for s in spans if s.name in HOST_PARTS])
    begins = [span.begin for span in spans if span.name == "forward"]
    ends = [span.end for span in spans if span.name == "sample"]
    gaps = [max(0.0, begin - end) for begin, end in zip(begins[1:], ends, strict=False)]
    # From the first step's begin to the last one's: as many steps as gaps, none of them cut.
    window = (begins[0], begins[-1]) if len(begins) > 1 else (begins[0], ends[-1])
    steps = max(1, len(begins) - 1)
    length = window[1] - window[0]
    work = sum(covered(host, window))
    return {
        "steps": len(begins),
        "step_us": length / steps,
        "median_gap_us": statistics.median(gaps) if gaps else 0.0,
        "device_idle_share": 1 - sum(covered(busy, window)) / length,
        "planner_us": work / steps,
        "planner_hidden_share": _hidden(host, busy, window) / work if work else 0.0,
    }


def _hidden(host: list[Interval], busy: list[Interval], window: Interval) -> float:
    """Time of `host` during which the device was busy."""
    return sum(sum(covered(busy, (max(b, window[0]), min(e, window[1])))) for b, e in host)


def draw(timelines: dict[str, list[Span]], title: str, window: int, file: Path) -> None:
    """One pair of lanes, planner above device, for each timeline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    figure, axes = pyplot.subplots(
        len(timelines), figsize=(10, 1.1 + 1.3 * len(timelines)), squeeze=False, sharex=True
    )
    for axis, (label, spans) in zip(axes[:, 0], timelines.items(), strict=True):
        steps = sorted({span.step for span in spans if span.name == "forward"})
        first = max(0, (len(steps) - window) // 2)
        shown = steps[first : first + window]
        inside = [s for s in spans if s.step in shown and s.name in DEVICE_PARTS]
        begin, end = inside[0].begin, max(span.end for span in inside)
        for span in spans:
            if span.name not in COLORS or span.end < begin or span.begin > end:
                continue
            lane = 0 if span.name in DEVICE_PARTS else 1
            left = (max(span.begin, begin) - begin) / 1e3
            width = (min(span.end, end) - max(span.begin, begin)) / 1e3
            axis.barh(lane, width, left=left, height=0.8, color=COLORS[span.name])
            if span.name == "forward" and span.step in shown:
                axis.text(left + width / 2, lane, str(span.step), ha="center", va="center", size=7)
        axis.set_yticks([0, 1], ["device", "planner"])
        axis.set_title(label, loc="left", size=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1, 0].set_xlabel("milliseconds")
    handles = [Patch(color=color, label=name) for name, color in COLORS.items() if name != "masks"]
    figure.legend(handles=handles, loc="upper right", ncols=len(handles), fontsize=7, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", size=10)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


def measure(args: argparse.Namespace) -> dict[str, Path]:
    """Timelines made now, by what they show; overlap on and off unless it was switched off."""
    timelines = {}
    modes = [True] if args.disable_overlap_schedule else [False, True]
    for disabled in modes:
        args.disable_overlap_schedule = disabled
        folder = workload.profile(args, args.out, traces=False)
        timelines["overlap off" if disabled else "overlap on"] = folder / "timeline.json"
    return timelines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    workload.add_options(parser)
    parser.add_argument("--file", type=Path, help="a timeline to read instead of making some")
    parser.add_argument("--window", type=int, default=6, help="steps in the picture")
    parser.add_argument("--out", type=Path, default=Path("profiles/out"), help="folder of files")
    args = parser.parse_args()
    if args.dry_run:
        what = f"read {args.file}" if args.file else f"profile {args.steps} steps, overlap on, off"
        print(f"{what}; write {args.out / 'timeline.png'}")
        return
    files = {args.file.name: args.file} if args.file else measure(args)
    rows, timelines, title = {}, {}, ""
    heads = ("steps", "us/step", "gap us", "idle", "planner us", "hidden")
    print(f"{'':14}" + "".join(f"{head:>11}" for head in heads))
    for label, file in files.items():
        title, timelines[label] = read(file)
        row = rows[label] = figures(timelines[label])
        print(
            f"{label:14}{row['steps']:>11}{row['step_us']:>11.0f}{row['median_gap_us']:>11.1f}"
            f"{row['device_idle_share']:>11.1%}{row['planner_us']:>11.1f}"
            f"{row['planner_hidden_share']:>11.1%}"
        )
    picture = args.out / "timeline.png"
    draw(timelines, title, args.window, picture)
    print(f"wrote {picture}")
    print(json.dumps({"profile": "timeline", "what": title, "picture": str(picture), **rows}))


if __name__ == "__main__":
    main()
