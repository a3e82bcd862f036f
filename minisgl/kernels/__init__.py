"""The engine's ops, one room each. Knows torch and Triton, nothing of requests or schedulers."""
