"""Checks that a draft model fits its target: the same tokens, and enough context."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minisgl.config import EngineConfig
from minisgl.models.config import ModelConfig
from minisgl.models.hub import model_directory

BUNDLED_DRAFT = Path(__file__).parents[1] / "assets" / "tiny-draft"


@dataclass(frozen=True)
class DraftFacts:
    """Where the draft model is, and what its config says."""

    path: Path
    model: ModelConfig


def read_draft(
    config: EngineConfig, target: ModelConfig, target_path: Path, max_context: int
) -> DraftFacts:
    """The draft model that the config names.

    Raises ValueError for one whose vocabulary, tokenizer or context does not fit the target's.
    """
    assert config.speculative_draft_model is not None
    path = BUNDLED_DRAFT
    if config.speculative_draft_model != BUNDLED_DRAFT.name:
        weights = config.load_format != "dummy"
        known = [BUNDLED_DRAFT.name]
        path = model_directory(config.speculative_draft_model, weights=weights, known=known)
    model = ModelConfig.from_hf(path)
    if model.vocab_size != target.vocab_size:
        raise ValueError(
            f"speculative_draft_model must have the model's vocabulary of {target.vocab_size}, "
            f"but {path} has {model.vocab_size}"
        )
    own, other = _tokens(path), _tokens(target_path)
    if own is not None and other is not None and own != other:
        raise ValueError(
            f"speculative_draft_model must have the model's tokenizer, but the tokens of {path} "
            f"differ from those of {target_path}"
        )
    if model.max_context < max_context:
        raise ValueError(
            f"speculative_draft_model must have a context of at least {max_context}, "
            f"but {path} has {model.max_context}"
        )
    return DraftFacts(path, model)


def _tokens(path: Path) -> tuple[Any, Any] | None:
    """Vocabulary and added tokens of a tokenizer.json or a GGUF file, if there is one."""
    file = path / "tokenizer.json"
    if path.suffix == ".gguf":
        from minisgl.gguf.header import read_gguf
        from minisgl.gguf.tokenizer import read_tokenizer

        parsed = read_tokenizer(read_gguf(path))[0]
    elif file.is_file():
        parsed = json.loads(file.read_text(encoding="utf-8"))
    else:
        return None
    added = {entry["id"]: entry["content"] for entry in parsed.get("added_tokens", [])}
    return parsed["model"].get("vocab"), added
