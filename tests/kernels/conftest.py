"""Kernels run under Triton's interpreter here: their own process, with TRITON_INTERPRET=1."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels.interpreter import repair

    repair()
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "tests/kernels: left out, it needs a process of its own with TRITON_INTERPRET=1"
