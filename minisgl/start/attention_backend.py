"""What `--attention-backend` chooses: the kernel that computes the attention of prompts."""

import torch

from minisgl.kernels.attention import attention, hopper_refusal
from minisgl.kernels.op import Op
from minisgl.models.config import ModelConfig

IMPLEMENTATIONS = {"triton": "portable", "gluon": "hopper"}


def attention_op(
    backend: str, facts: ModelConfig, dtype: torch.dtype, page_size: int, device: torch.device
) -> Op:
    """The op for the layers of the model. `auto` leaves the choice to the device: on a GPU it is
    Triton until a run on one says that Gluon is faster.

    Raises ValueError, naming the limit and the value, where `backend` cannot serve the model.
    """
    if backend == "auto":
        return attention
    op = attention.only(IMPLEMENTATIONS[backend])
    if device.type == "cpu":
        raise ValueError(f"attention_backend {backend} needs a CUDA device, got {device}")
    [implementation] = op.implementations
    if not implementation.supports(device):
        major, minor = torch.cuda.get_device_capability(device)
        wanted = "sm_{}{}".format(*implementation.capability or ())
        raise ValueError(f"attention_backend {backend} needs {wanted}, got sm_{major}{minor}")
    for layer in facts.layers if backend == "gluon" else ():
        refusal = hopper_refusal(
            facts.head_dim, dtype, page_size, layer.window, facts.attention_softcap
        )
        if refusal is not None:
            raise ValueError(f"attention_backend gluon {refusal}")
    return op
