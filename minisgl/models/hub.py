"""Where a model's files are: a directory as given, or one downloaded from the Hugging Face hub."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

# Weights, configs, tokenizers and chat templates; nothing that holds code or pickles.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
WITHOUT_WEIGHTS = PATTERNS[1:]
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def model_directory(model: str, *, weights: bool = True) -> Path:
    """The directory of `model`: a path, or a hub id "owner/name", downloaded if it is not cached.

    weights=False leaves the weights out, for random ones. Raises ValueError for what is neither a
    directory nor found on the hub, with the hub's reason, and for a model on the hub without
    safetensors weights.
    """
    path = Path(os.path.expanduser(model))  # which leaves "~" alone where there is no home
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"model must be a directory or a hub id, but {model} is a file")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        directory = Path(
            snapshot_download(
                model,
                allow_patterns=PATTERNS if weights else WITHOUT_WEIGHTS,
                ignore_patterns=["consolidated*", "original/*"],
            )
        )
        if weights and not any(directory.glob("*.safetensors")):
            refuse_pickles(f"model {model!r} on the hub", _names_on_hub(model))
        return directory
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"model {model!r} is neither a directory here nor a model on the hub: {error}"
        ) from error


def refuse_pickles(where: str, names: Iterable[str]) -> NoReturn:
    """Raises ValueError: `where` has no safetensors; `names` say whether it has pickles instead."""
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        raise ValueError(
            f"{where} holds pickle checkpoints ({', '.join(pickles[:5])}), which can run code and "
            "are not read; convert them to safetensors"
        )
    raise ValueError(f"{where} holds no .safetensors file")


def _names_on_hub(model: str) -> list[str]:
    from huggingface_hub import list_repo_files

    try:
        return list_repo_files(model)
    except OSError:  # the hub cannot be reached; the files came from the cache
        return []
