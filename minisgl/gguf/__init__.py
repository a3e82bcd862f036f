"""GGUF files: what they say in the terms of a Hugging Face folder, and their tensors.

A file may come from anybody: nothing in it is used before it is checked. Only constants and
dequantisers are the `gguf` package's, whose reader trusts files.
"""
