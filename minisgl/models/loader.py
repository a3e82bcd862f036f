"""Loading a decoder: files are read tensor by tensor, straight into its weights."""

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from minisgl.layers.weights import Placement, Weight
from minisgl.log import get_logger, shows_progress
from minisgl.models.config import ModelConfig, read_json
from minisgl.models.decoder import Decoder
from minisgl.models.families import Family
from minisgl.models.hub import refuse_pickles
from minisgl.parallel import Communicator

if TYPE_CHECKING:
    from minisgl.gguf.weights import GgufWeights

log = get_logger(__name__)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BLOCK = 1_000_003  # random numbers; prime: no two rows of a matrix begin at the same one
OPENED_FOR = 16  # tensors: what is read of a file is this process's memory until it is closed
_SHOWN = 5  # names in an error message

PIECE = 2**24  # elements copied at once, which a GGUF file's are dequantised for

T = TypeVar("T")
# A safetensors file, or an open GGUF file, which is read like an open one of the others.
Source: TypeAlias = "Path | GgufWeights"
Stored = dict[str, tuple[Source, str]]  # weight -> its file, and its name there


def load_model(config: ModelConfig, path: Path | None, at: Placement, seed: int = 0) -> Decoder:
    """Build this rank's part of the model and fill its weights, cast to the placement's dtype.

    path: a directory of safetensors files, or a GGUF file; without one, weights are random and
    depend on `seed` and their names only. A checkpoint may hold a head that its config ties: the
    model's own config says which it is. Raises ValueError naming the tensors for weights that are
    unknown, missing or of another shape, before anything is allocated, and for pickle checkpoints.
    """
    stored = {} if path is None else _find_weights(config.family, _sources(path))
    if config.tied_embeddings and HEAD in stored:
        config = _settle_head(config, stored)
    if path is not None:
        _check(Decoder(config, replace(at, device=torch.device("meta"))), stored)
    decoder = Decoder(config, at)
    if path is None:
        _fill_at_random(decoder, seed, at.device)
    else:
        _fill_from_files(decoder, stored)
    return decoder


def progress(items: Sequence[T], what: str, unit: str) -> Iterable[T]:
    """`items`, with a bar on a terminal that shows which has come."""
    hidden = not shows_progress()
    return tqdm(items, desc=what, unit=unit, leave=False, disable=hidden)  # type: ignore[no-any-return]


def find_files(path: Path) -> list[Path]:
    """The safetensors files of a model directory: the single one, or those that its index names.

    Raises ValueError naming what is missing, or an index that names nothing.
    """
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if index.exists() and not single.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} must map weights to files in weight_map, got {weight_map!r}")
        files = [path / name for name in sorted({*map(str, weight_map.values())})]
        if missing := [file.name for file in files if not file.exists()]:
            raise ValueError(f"{path} lacks {_some(missing)}, which {index.name} names")
        return files
    for pattern in (single.name, "model*.safetensors", "*.safetensors"):
        if files := sorted(path.glob(pattern)):
            return files
    refuse_pickles(str(path), (file.name for file in path.glob("*")))


def checkpoint_name(family: Family, name: str) -> str | None:
    """The weight a checkpoint's tensor is, in the Llama convention; None for what is not needed."""
    ignored = name.removeprefix("model.").startswith(family.ignored)
    if ignored or name.endswith(".rotary_emb.inv_freq"):
        return None
    for old, new in family.renames:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _sources(path: Path) -> Sequence[Source]:
    if path.suffix != ".gguf":
        return find_files(path)
    from minisgl.gguf.config import read_weights
    from minisgl.gguf.header import read_gguf

    return [read_weights(read_gguf(path))]


def _open(file: Source) -> Any:
    if not isinstance(file, Path):
        return file
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        pointer = file.stat().st_size < 1000 and b"git-lfs" in file.read_bytes()
        what = "a git-lfs pointer, see `git lfs pull`" if pointer else error
        raise ValueError(f"{file} is no whole safetensors file: {what}") from error


def _find_weights(family: Family, files: Sequence[Source]) -> Stored:
    stored: Stored = {}
    for file in files:
        with _open(file) as tensors:
            for inside in tensors.keys():  # noqa: SIM118 (the file is not a mapping)
                name = checkpoint_name(family, inside)
                if name in stored:
                    raise ValueError(f"{file.name}: {inside} is in {stored[name][0].name} too")
                if name is not None:
                    stored[name] = file, inside
    return stored


def _settle_head(config: ModelConfig, stored: Stored) -> ModelConfig:
    """What a head is to a model whose config ties it to the embedding, as transformers has it.

    It stands in for an embedding that is not stored; one that differs from it is a head.
    """
    head = stored.pop(HEAD)
    if EMBEDDING not in stored:
        stored[EMBEDDING] = head
    elif not torch.equal(_read(head), _read(stored[EMBEDDING])):
        log.warning("the config ties lm_head to the embedding, but they differ: both are used")
        stored[HEAD] = head
        return replace(config, tied_embeddings=False)
    return config


def _read(at: tuple[Source, str]) -> torch.Tensor:
    with _open(at[0]) as tensors:
        return tensors.get_tensor(at[1])  # type: ignore[no-any-return]


def _check(wanted: Decoder, stored: Stored) -> None:
    """Raises ValueError where the stored tensors are not those of the model."""
    weights = {weight.name: weight for weight in wanted.weights()}
    if unknown := [inside for name, (_, inside) in stored.items() if name not in weights]:
        raise ValueError(f"unknown weights for {wanted.config.architecture}: {_some(unknown)}")
    if missing := weights.keys() - stored.keys():
        raise ValueError(f"weights missing from the checkpoint: {_some(sorted(missing))}")
    for file, some in groupby(_in_order(stored), lambda item: item[1][0]):
        with _open(file) as tensors:
            for name, (_, inside) in some:
                shape = tuple(tensors.get_slice(inside).get_shape())
                if shape != (asked := weights[name].shape):
                    wanted_shape = f"the config asks for {asked}"
                    raise ValueError(f"{file.name}: {inside} has shape {shape}, {wanted_shape}")


def _fill_from_files(decoder: Decoder, stored: Stored) -> None:
    wanted = {weight.name: weight for weight in decoder.weights()}
    shown = progress(_in_order(stored), "loading weights", "tensor")
    for (file, _), some in groupby(enumerate(shown), lambda at: (at[1][1][0], at[0] // OPENED_FOR)):
        with _open(file) as tensors:
            for _, (name, (_, inside)) in some:
                _copy(wanted[name], tensors.get_slice(inside))


def _in_order(stored: Stored) -> list[tuple[str, tuple[Source, str]]]:
    return sorted(stored.items(), key=lambda item: (item[1][0].name, item[1][1]))


def _copy(weight: Weight, tensor: Any) -> None:
    """Fill it some rows after others, so that little is held beside it."""
    first, *others = weight.slices
    start, step = first.start or 0, max(1, PIECE // max(1, math.prod(weight.shape[1:])))
    for at in range(0, len(weight.target), step):
        target = weight.target[at : at + step]
        part = tensor[(slice(start + at, start + at + len(target)), *others)]
        target.copy_(torch.as_tensor(part))


def _fill_at_random(decoder: Decoder, seed: int, device: torch.device) -> None:
    """Matrices keep the scale of their input, norms are near one and biases small.

    Every weight is filled from one block of random numbers, beginning at a place of its own and
    repeating it: drawing new numbers for all would take seconds per billion.
    """
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.empty(BLOCK).uniform_(-1.0, 1.0, generator=generator).to(device)
    for weight in decoder.weights():
        if weight.name.endswith(".bias"):
            block = numbers * 0.1
        elif len(weight.shape) == 1:
            block = numbers * 0.5 + 1.0
        else:
            block = numbers * (3.0 / weight.shape[1]) ** 0.5
        target = weight.target
        block = torch.roll(block, -(zlib.crc32(weight.name.encode()) % BLOCK)).to(target.dtype)
        here = target.shape == weight.shape and target.is_contiguous()
        full = target if here else target.new_empty(weight.shape)
        whole = full.numel() // BLOCK * BLOCK
        flat = full.view(-1)
        flat[:whole].view(-1, BLOCK).copy_(block.expand(whole // BLOCK, -1))
        flat[whole:] = block[: flat.numel() - whole]
        if not here:
            target.copy_(full[weight.slices])


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def check_shares(config: ModelConfig, ranks: int) -> None:
    """Raises ValueError where `ranks` ranks cannot share the model. Allocates nothing."""
    try:
        Decoder(config, Placement(torch.float32, torch.device("meta"), Communicator(0, ranks)))
    except ValueError as error:
        raise ValueError(f"tp_size must divide what ranks share, got {ranks}: {error}") from error
