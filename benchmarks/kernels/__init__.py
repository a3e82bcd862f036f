"""Micro-benchmarks of the op cards at the shapes of real models: `python -m benchmarks.kernels`."""
