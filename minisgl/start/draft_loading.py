"""Loading the draft model of a target, and what makes it one: the same tokens, enough context."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minisgl.config import EngineConfig
from minisgl.device import Device
from minisgl.kernels.shapes import EngineShapes
from minisgl.models.config import ModelConfig
from minisgl.models.hub import model_directory
from minisgl.models.loader import load_model
from minisgl.parallel import Communicator
from minisgl.step.draft import FIRST_WIDTH, Draft
from minisgl.step.kv_pool import KVShape

BUNDLED_DRAFT = Path(__file__).parents[1] / "assets" / "tiny-draft"


def draft_launches(engine: EngineShapes) -> EngineShapes:
    """What the draft model is launched with in that engine: its passes' widths, no groups, and no
    fixed order, since what is drafted changes no token."""
    return replace(engine, widths=(1, FIRST_WIDTH), cascade=False, batch_invariant=False)


def load_draft(
    config: EngineConfig,
    target: ModelConfig,
    target_path: Path,
    max_context: int,
    dtype: torch.dtype,
    device: Device,
    comm: Communicator,
) -> Draft:
    """The draft model that the config names, computed in the target's `dtype`.

    Raises ValueError for one whose vocabulary, tokenizer or context does not fit the target's.
    """
    if comm.rank:
        return Draft(None, None, config.num_draft_tokens)
    assert config.speculative_draft_model is not None
    path = BUNDLED_DRAFT
    if config.speculative_draft_model != BUNDLED_DRAFT.name:
        weights = config.load_format != "dummy"
        path = model_directory(config.speculative_draft_model, weights=weights)
    facts = ModelConfig.from_hf(path)
    if facts.vocab_size != target.vocab_size:
        raise ValueError(
            f"speculative_draft_model must have the model's vocabulary of {target.vocab_size}, "
            f"but {path} has {facts.vocab_size}"
        )
    own, other = _tokens(path), _tokens(target_path)
    if own is not None and other is not None and own != other:
        raise ValueError(
            f"speculative_draft_model must have the model's tokenizer, but the tokens of {path} "
            f"differ from those of {target_path}"
        )
    if facts.max_context < max_context:
        raise ValueError(
            f"speculative_draft_model must have a context of at least {max_context}, "
            f"but {path} has {facts.max_context}"
        )
    model = device.run(
        lambda: load_model(
            facts,
            path,
            dtype=dtype,
            device=device.torch_device,
            load_format=config.load_format,
            seed=config.random_seed,
        )
    )
    shape = KVShape(facts.num_layers, facts.num_kv_heads, facts.head_dim, dtype)
    return Draft(model, shape, config.num_draft_tokens)


def _tokens(path: Path) -> tuple[Any, Any] | None:
    """Vocabulary and added tokens of a tokenizer.json, if there is one."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    parsed = json.loads(file.read_text(encoding="utf-8"))
    added = {entry["id"]: entry["content"] for entry in parsed.get("added_tokens", [])}
    return parsed["model"].get("vocab"), added
