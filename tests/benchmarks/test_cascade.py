"""The cascade benchmark compares tokens and times steps with groups and without."""

import json
import subprocess
import sys


def test_runs_on_a_cpu():
    command = [sys.executable, "-m", "benchmarks.cascade", "--shape", "tiny", "--device", "cpu"]
    sizes = ["--batch", "3", "--shared", "40", "--steps", "4", "--rounds", "1", "--check", "6"]
    run = subprocess.run(
        [*command, "--dtype", "float32", *sizes], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["equal_tokens"] == 1.0
    assert result["times_as_fast"] > 0
    assert (result["batch"], result["shared"]) == (3, 40)
