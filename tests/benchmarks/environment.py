"""Environments that hold some packages of this one and nothing else, made in a second offline."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement


def closure(packages: Iterable[str]) -> dict[str, Distribution]:
    """The distributions of importable packages, and of all that those require."""
    owners = packages_distributions()
    waiting = [owners[package][0] for package in packages]
    found: dict[str, Distribution] = {}
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        found[name] = distribution(name)
        for line in found[name].requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def make_environment(folder: Path, packages: Iterable[str]) -> Path:
    """A virtual environment of links to `packages` and what they require; its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    site = next((folder / "lib").glob("python*")) / "site-packages"
    for one in closure(packages).values():
        tops = {path.parts[0] for path in one.files or () if path.parts[0] != ".."}
        for top in tops:
            if not top.endswith(".pth") and not (site / top).exists():
                (site / top).symlink_to(Path(str(one.locate_file(top))))
    return python


def path_with(folder: Path, programs: Iterable[str]) -> str:
    """A PATH with these programs and no others."""
    folder.mkdir()
    for program in programs:
        found = shutil.which(program)
        assert found is not None, program
        (folder / program).symlink_to(found)
    return os.fspath(folder)
