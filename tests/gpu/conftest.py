"""Before CUDA starts: streams that wait for each other must not share a hardware queue."""

import os

from minisgl.kernels.all_reduce.virtual import QUEUES

os.environ.update(QUEUES)
