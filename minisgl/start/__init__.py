"""Once, before anything is served: from a config and a model on disk to a worker that is ready."""
