"""Structured output: specifications become grammars, by llguidance (docs/STRUCTURED.md)."""
