"""Kernels are compiled here, for GPUs that need not be there; never under the interpreter."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]
