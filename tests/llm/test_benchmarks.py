"""The benchmarks of this room run and end in one JSON line. Their figures are not judged."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DUMMY = ["--load-format", "dummy"]


def run(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.thorough
def test_offline_compares_engines_in_turns(model_directory: Path):
    sizes = ["--num-requests", "3", "--input-len", "3", "9", "--output-len", "2", "5"]
    engines = ["--engine", "minisgl", "transformers"]
    result = run("benchmarks.offline", "--model", str(model_directory), *sizes, *engines, *DUMMY)
    speeds = result["output_tokens_per_second"]
    assert list(speeds) == ["minisgl", "transformers"]
    assert result["ratio"] > 0


def test_startup_names_its_stages_and_the_engines(model_directory: Path):
    options = ["--model", str(model_directory), *DUMMY, "--rounds", "1"]
    result = run("benchmarks.startup", *options)
    assert abs(sum(result["stages"].values()) - result["seconds"]) < 0.01
    assert result["peak_mb"] > 0
    assert list(result["engine_stages"]) == list(result["first_engine_stages"])
    within = sum(result["engine_stages"].values())
    assert 0 < within <= result["stages"]["load and warm up"] + 0.05  # as they are rounded


def test_startup_refuses_an_unknown_shape():
    command = [sys.executable, "-m", "benchmarks.startup", "--shape", "qwen3-9b"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "argument --shape: invalid choice: 'qwen3-9b' (choose from" in done.stderr
