"""The batch-invariant mode: a request's tokens do not depend on what is computed beside it.

Every sum of the model is taken in an order that a token's own row, position and sequence decide,
whatever the batch, the chunking, the cache or the graphs (He et al., "Defeating Nondeterminism in
LLM Inference", 2025).
"""

from contextlib import ExitStack

import torch

from minisgl import csrc
from minisgl.kernels.config import fixed_order
from minisgl.kernels.native import DTYPES
from minisgl.kernels.op import forced
from minisgl.layers.attention import ForwardInputs
from minisgl.models.config import ModelConfig
from minisgl.step.runner import Model


class FixedOrder:
    """A model whose passes are computed in a fixed order; where cuBLAS picks one, we do not ask."""

    def __init__(self, model: Model, device: torch.device) -> None:
        self._model = model
        self._choices = {"linear": "persistent"} if device.type == "cuda" else {}

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


def check_fixed_order(facts: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError, naming the limit, where the mode cannot be kept. May wait for a build."""
    if device.type != "cpu":
        return
    native = csrc.load("model_ops", wait=True)
    if native is None:
        raise ValueError(
            "batch_invariant needs the native CPU operators, which could not be built (see above)"
        )
    if dtype not in DTYPES:
        raise ValueError(f"batch_invariant on CPU needs dtype bfloat16 or float32, got {dtype}")
    if facts.head_dim not in native.DECODE_HEAD_DIMS:
        raise ValueError(
            f"batch_invariant on CPU needs a head_dim among {list(native.DECODE_HEAD_DIMS)}, "
            f"got {facts.head_dim}"
        )
