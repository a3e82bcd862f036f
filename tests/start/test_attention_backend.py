"""The kernel of prompt attention is chosen by a flag, and refused where it cannot serve."""

import pytest
import torch

from minisgl import LLM
from minisgl.kernels.attention import attention
from minisgl.kernels.op import Op
from minisgl.layers.weights import Placement
from minisgl.models.config import ModelConfig
from minisgl.models.loader import load_model
from minisgl.start.attention_backend import attention_op

CPU, GPU = torch.device("cpu"), torch.device("cuda")
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 131,
    "hidden_size": 256,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "eos_token_id": 3,
    "torch_dtype": "bfloat16",
}
WINDOWED = LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 32}
CAPPED = LLAMA | {
    "architectures": ["Gemma2ForCausalLM"],
    "layer_types": ["full_attention"] * LLAMA["num_hidden_layers"],
    "attn_logit_softcapping": 50.0,
}


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the GPU that there seems to be."""
    found = [9, 0]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: tuple(found))
    return found


def choose(
    backend: str,
    config: dict[str, object] = LLAMA,
    *,
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = 16,
    device: torch.device = GPU,
) -> Op:
    return attention_op(backend, ModelConfig.from_dict(config), dtype, page_size, device)


def test_a_backend_is_one_implementation(capability: list[int]) -> None:
    from minisgl.kernels.attention.hopper import attention_hopper
    from minisgl.kernels.attention.portable import attention_portable

    assert choose("gluon").choose(GPU) is attention_hopper
    assert choose("gluon", dtype=torch.float16, page_size=64).choose(GPU) is attention_hopper
    for backend in ("triton", "auto"):
        assert choose(backend).choose(GPU) is attention_portable
    assert choose("triton", WINDOWED, dtype=torch.float32).choose(GPU) is attention_portable
    assert choose("auto", device=CPU) is attention
    assert len(attention.implementations) > 1  # the card is as it was


@pytest.mark.parametrize(
    ("facts", "refusal"),
    [
        ({"config": LLAMA | {"head_dim": 64}}, "needs head_dim 128, got 64"),
        ({"dtype": torch.float32}, "needs dtype bfloat16 or float16, got float32"),
        ({"page_size": 1}, "needs a page_size of at least 16, got 1"),
        ({"config": WINDOWED}, "needs attention without a sliding window, got one of 32 tokens"),
        ({"config": CAPPED}, "needs attention scores without a soft cap, got one of 50.0"),
        ({"device": CPU}, "needs a CUDA device, got cpu"),
    ],
)
def test_what_gluon_cannot_serve_is_refused(
    capability: list[int], facts: dict[str, object], refusal: str
) -> None:
    with pytest.raises(ValueError, match=f"^attention_backend gluon {refusal}$"):
        choose("gluon", **facts)  # type: ignore[arg-type]


@pytest.mark.parametrize("other", [(8, 0), (10, 0)])
def test_gluon_is_for_hopper_alone(capability: list[int], other: tuple[int, int]) -> None:
    capability[:] = other
    major, minor = other
    message = f"^attention_backend gluon needs sm_90, got sm_{major}{minor}$"
    with pytest.raises(ValueError, match=message):
        choose("gluon")
    assert choose("triton").implementations


def test_an_unknown_implementation_is_named() -> None:
    with pytest.raises(KeyError, match="op attention has no implementation 'fast'"):
        attention.only("fast")


def test_layers_attend_by_the_op_they_are_given(capability: list[int]) -> None:
    gluon = choose("gluon")
    at = Placement(torch.bfloat16, CPU, attention=gluon)
    model = load_model(ModelConfig.from_dict(LLAMA), None, at)
    assert all(layer.attention.attention is gluon for layer in model.layers)


@pytest.mark.parametrize("backend", ["triton", "gluon"])
def test_a_start_refuses_a_backend_without_a_gpu(backend: str) -> None:
    with pytest.raises(ValueError, match=f"^attention_backend {backend} needs a CUDA device"):
        LLM(device="cpu", attention_backend=backend)
