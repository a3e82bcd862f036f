"""The processes of tensor parallelism: rank 0 leads, the others follow."""
