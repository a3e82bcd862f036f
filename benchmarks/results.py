"""What a benchmark finds: a file that is whole whenever the benchmark is cut, and a last line.

The file is one JSON object, replaced with every row that is added: what was measured before an end
that nobody planned is there. `late` names what was not begun in the time given, `finished` says
whether the benchmark came to its end.
"""

import argparse
import datetime
import json
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every benchmark that a check on a GPU machine runs."""
    parser.add_argument("--out", type=Path, help="folder for the figures, written as they come")
    parser.add_argument("--seconds", type=float, help="begin nothing later than this")
    parser.add_argument("--commit", help="of this tree; default: what git says, if it is there")


class Results:
    """The figures of one run of the benchmark called `name`, in `--out`/name.json."""

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        *,
        resume: bool = False,
        end: float | None = None,
    ) -> None:
        """resume: goes on with the figures that are in the file. end: the moment, by the monotonic
        clock, after which nothing is begun; by default `--seconds` from now."""
        self._path = None if args.out is None else args.out / f"{name}.json"
        self.end = end
        if end is None and args.seconds is not None:
            self.end = time.monotonic() + args.seconds
        self._limit = args.seconds
        self.content: dict[str, Any] = {"benchmark": name, "commit": commit(args.commit)}
        self.content |= {"date": today(), "late": [], "finished": False}
        if self._path is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            if resume:
                self.content = json.loads(self._path.read_text())
            self._write()

    def put(self, **fields: Any) -> None:
        self.content |= fields
        self._write()

    def add(self, name: str, row: Any) -> None:
        """Appends to the list called `name`."""
        self.content.setdefault(name, []).append(row)
        self._write()

    def is_late(self, what: str) -> bool:
        """Whether the time is up, so that `what` is not to be begun. It is named in the file."""
        if self.end is None or time.monotonic() <= self.end:
            return False
        print(f"  {what}: not begun within {self._limit:g} s", flush=True)
        self.add("late", what)
        return True

    def finish(self, **fields: Any) -> None:
        """The last figures, and everything once more as the last line of the output."""
        self.put(**fields, finished=True)
        print(json.dumps(self.content))

    def _write(self) -> None:
        if self._path is not None:
            replace(self._path, json.dumps(self.content) + "\n")


def replace(path: Path, text: str) -> None:
    """Writes a file at once: whoever reads it finds all of the old or all of the new."""
    fresh = path.with_name(f"{path.name}.part")
    fresh.write_text(text)
    fresh.replace(path)


def commit(given: str | None = None) -> str:
    """The commit as given, or as git names it ("-dirty" where files differ), or "unknown"."""
    if given is not None:
        return given

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    try:
        if git("rev-parse", "--show-toplevel") != str(ROOT):  # a tree in another repository
            return "unknown"
        return git("describe", "--always", "--dirty", "--exclude=*") or "unknown"
    except OSError:  # a machine without git
        return "unknown"


def today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def device_name(device: str) -> str:
    """Of "cuda" or "cpu"."""
    if device == "cpu":
        return platform.processor() or platform.machine()
    import torch

    return str(torch.cuda.get_device_name(device))
