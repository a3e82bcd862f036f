"""Where a model's files are: a directory as given, or one downloaded from the Hugging Face hub."""

from pathlib import Path

# Weights, configs, tokenizers and chat templates; nothing that holds code or pickles.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
WITHOUT_WEIGHTS = PATTERNS[1:]


def model_directory(model: str, *, weights: bool = True) -> Path:
    """The directory of `model`: a path, or a hub id "owner/name", downloaded if it is not cached.

    weights=False leaves the weights out, for random ones. Raises ValueError for what is neither a
    directory nor found on the hub, with the hub's reason.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"model must be a directory or a hub id, but {model} is a file")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                model,
                allow_patterns=PATTERNS if weights else WITHOUT_WEIGHTS,
                ignore_patterns=["consolidated*", "original/*"],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"model {model!r} is no directory here and no model on the hub: {error}"
        ) from error
