"""What a check on a GPU machine has found, in Markdown: a summary, and all of it."""

import json
from pathlib import Path
from typing import Any

from benchmarks.kernels.report import goal_table

TAIL = 4000  # characters of a failed stage's output that are shown
PLAIN = (int, float, str)

Record = dict[str, Any]


def figures(folder: Path) -> list[Record]:
    """What benchmarks have left in a stage's folder; nothing of a file that is none of theirs."""
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except (ValueError, OSError):
            content = None
        if is_figures(content):
            found.append(content)
        else:
            print(f"{path}: not what a benchmark writes, left out", flush=True)
    return found


def is_figures(content: object) -> bool:
    """Whether it has the shape of what `benchmarks.results` writes."""
    if not isinstance(content, dict) or not isinstance(content.get("benchmark"), str):
        return False
    records = [content.get(name, []) for name in ("rows", "mixed", "goals")]
    late = content.get("late", [])
    return (
        isinstance(late, list)
        and all(isinstance(what, str) for what in late)
        and all(isinstance(rows, list) for rows in records)
        and all(isinstance(row, dict) for rows in records for row in rows)
        and all("goal" in goal and "state" in goal for goal in content.get("goals", []))
    )


def summary(result: Record, out: Path) -> str:
    """How every stage ended, and the goals."""
    said = result["about"]
    lines = [
        f"# Check on {said['device']}",
        f"Commit {said['commit']}, {said['date']}, torch {said['torch']}, Python {said['python']}.",
        "| stage | state | seconds | commit | device | |\n|---|---|---:|---|---|---|",
    ]
    for name, record in result["stages"].items():
        before = record.get("before")
        kept = "" if before is None else f"{before['state']} at {before['commit']}: {name}.before"
        words = "; ".join(filter(None, (record["reason"], kept)))
        lines[-1] += (
            f"\n| {name} | {record['state']} | {record.get('seconds', '')} "
            f"| {record['commit']} | {record['device']} | {cell(words)} |"
        )
    for name in result["stages"]:
        for content in figures(out / name):
            if content.get("goals"):
                lines.append(f"Goals of `{name}`:\n\n{goal_table(content['goals'])}")
    return "\n\n".join(lines)


def markdown(result: Record, out: Path) -> str:
    """The summary, then what each stage found, and the end of the output of those that failed."""
    lines = [summary(result, out)]
    for name, record in result["stages"].items():
        for content in figures(out / name):
            lines += show(name, content)
        log = out / name / "log.txt"
        if record["state"] in ("failed", "cut") and log.exists():
            text = log.read_text(errors="replace")[-TAIL:].strip()
            lines.append(f"## {name}: end of its output\n\n````\n{text}\n````")
    return "\n\n".join(lines) + "\n"


def show(name: str, content: Record) -> list[str]:
    """A stage's plain figures and its rows."""
    plain = {k: v for k, v in content.items() if isinstance(v, PLAIN)}
    lines = [f"## {name}\n\n" + "\n".join(f"- {k}: {v}" for k, v in plain.items())]
    rows = [(k, v) for k, v in content.items() if k in ("rows", "mixed") and v]
    if content.get("benchmark") == "tests":
        rows = [("rows", [r for r in content.get("rows", ()) if r.get("outcome") != "passed"])]
    if content.get("benchmark") != "kernels":  # whose own tables stand in kernels.md
        lines += [table(own) for _, own in rows if own]
    return lines


def table(rows: list[Record]) -> str:
    """Rows as Markdown, of what is no list or record itself; the columns are the first row's."""
    names = [name for name, value in rows[0].items() if value is None or isinstance(value, PLAIN)]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(cell(row.get(name, '')) for name in names)} |")
    return "\n".join(lines)


def cell(value: object) -> str:
    """A value in a table of Markdown: the last line of a long one."""
    return str(value).strip().split("\n")[-1].replace("|", "\\|")
