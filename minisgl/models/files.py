"""The safetensors files of a model directory."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from minisgl.models.config import read_json
from minisgl.models.hub import refuse_pickles

_SHOWN = 5  # names in an error message


def find_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory: the single one, or those that its index names.

    Raises ValueError naming what is missing, or an index that names nothing.
    """
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if index.exists() and not single.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} must map weights to files in weight_map, got {weight_map!r}")
        files = [path / name for name in sorted({*map(str, weight_map.values())})]
        if missing := [file.name for file in files if not file.exists()]:
            raise ValueError(f"{path} lacks {some(missing)}, which {index.name} names")
        return files
    for pattern in (single.name, "model*.safetensors", "*.safetensors"):
        if files := sorted(path.glob(pattern)):
            return files
    refuse_pickles(str(path), (file.name for file in path.glob("*")))


def open_safetensors(file: Path) -> Any:
    """Raises ValueError naming a file that is none, or not all of one."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        pointer = file.stat().st_size < 1000 and b"git-lfs" in file.read_bytes()
        what = "a git-lfs pointer, see `git lfs pull`" if pointer else error
        raise ValueError(f"{file} is no whole safetensors file: {what}") from error


def some(names: list[str]) -> str:
    """The names, of many the first, as errors show them."""
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
