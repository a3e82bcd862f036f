"""The loop that plans, dispatches, collects and emits, and the process it runs in."""
