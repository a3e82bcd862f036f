"""Start-up, which happens once: from a config and a model on disk to a worker that is ready."""
