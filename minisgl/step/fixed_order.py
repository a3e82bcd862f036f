"""The batch-invariant mode: a request's tokens do not depend on what is computed beside it.

Every sum of the model is taken in an order that a token's own row, position and sequence decide,
whatever the batch, the chunking, the cache or the graphs (He et al., "Defeating Nondeterminism in
LLM Inference", 2025).
"""

from contextlib import ExitStack

import torch

from minisgl.kernels.config import fixed_order
from minisgl.kernels.op import forced
from minisgl.layers.attention import ForwardInputs
from minisgl.step.runner import Model


class FixedOrder:
    """A model computed in a fixed order. On a GPU our own product replaces cuBLAS, whose order
    varies with the number of rows."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self._model = model
        self._choices = {"linear": "persistent"} if device.type != "cpu" else {}

    def forward(self, inputs: ForwardInputs) -> torch.Tensor:
        with self._order():
            return self._model.forward(inputs)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        with self._order():
            return self._model.logits(hidden)

    def _order(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(fixed_order())
        stack.enter_context(forced(self._choices))
        return stack
