"""What `pip install` gets: bounded requirements, pinned constraints, a wheel with its sources."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import minisgl
from minisgl.log import configure, get_logger

ROOT = Path(__file__).parents[1]
SHIPPED = ["minisgl", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel's unpacked folder, built from a copy so that no build files land in the tree."""
    copy = tmp_path_factory.mktemp("tree")
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, copy / name)
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    command = [sys.executable, "-m", "pip", "wheel", ".", "-q", "-w", "out", *offline]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = (copy / "out").glob("*.whl")
    assert archive.name == f"minisgl-{minisgl.__version__}-py3-none-any.whl"  # nothing compiled
    zipfile.ZipFile(archive).extractall(copy / "site")
    return copy / "site"


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_all_of_the_package(wheel):
    ours = {f for f in files_below(ROOT / "minisgl") if not f.startswith("csrc/src/")}
    shipped = files_below(wheel / "minisgl")
    assert ours - shipped == set()
    assert {f"csrc/src/{f}" for f in files_below(ROOT / "csrc")} <= shipped


def test_an_installed_loader_finds_its_sources(wheel):
    code = "from minisgl.csrc import build; print(build.__file__, build.SOURCES)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=wheel, capture_output=True, text=True, check=True
    )
    module, sources = run.stdout.split()
    assert Path(module).is_relative_to(wheel)
    assert Path(sources, "cpu/core_ops.cpp").is_file()


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(folder: Path) -> list[Requirement]:
    (metadata,) = folder.glob("*.dist-info/METADATA")
    return [
        Requirement(r) for r in re.findall(r"^Requires-Dist: (.+)$", metadata.read_text(), re.M)
    ]


def test_every_requirement_is_bounded_and_pinned_within_its_bounds(wheel):
    pins = {
        canonical(name): Version(version)
        for name, version in re.findall(
            r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M
        )
    }
    assert requirements(wheel)
    for requirement in requirements(wheel):
        assert {"<", ">="} <= {s.operator for s in requirement.specifier}, requirement
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_everything_imported_is_required(wheel):
    distributions = packages_distributions()
    imported: dict[str, str] = {}
    for path in (ROOT / "minisgl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            imported |= {name.split(".")[0]: path.name for name in names}
    at_run_time = [r for r in requirements(wheel) if not re.search("test|bench", str(r.marker))]
    required = {canonical(requirement.name) for requirement in at_run_time}
    required |= {"cuda-bindings"}  # the part of cuda-python we name
    for name, where in imported.items():
        if name != "minisgl" and name not in sys.stdlib_module_names:
            found = {canonical(distribution) for distribution in distributions.get(name, [name])}
            assert found & required, f"{where} imports {name}, which setup.py does not require"


def test_names_load_at_first_use():
    assert set(minisgl.__all__) <= set(dir(minisgl))
    with pytest.raises(AttributeError, match="no attribute 'Missing'"):
        minisgl.Missing  # noqa: B018
    assert minisgl.SamplingParams.__name__ == "SamplingParams"


def test_the_log_names_its_process(capsys):
    try:
        configure("INFO", "rank 1 50%")
        configure("INFO", "rank 1 50%")  # again replaces, and does not double the lines
        get_logger("minisgl.engine").info("step %d", 3)
        get_logger(__name__).debug("not shown")
        assert re.fullmatch(r"\d\d:\d\d:\d\d rank 1 50% INFO step 3\n", capsys.readouterr().err)
        with pytest.raises(ValueError, match=r"log_level must be .* not 'loud'"):
            configure("loud")
    finally:
        root = get_logger("minisgl")
        root.handlers.clear()
        root.propagate = True
