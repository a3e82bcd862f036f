"""Loading a decoder: files are read layer by layer, straight into its weights."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from tqdm import tqdm

from minisgl.device.cpu import give_back_freed_memory
from minisgl.layers.weights import Block, Placement, Weight
from minisgl.log import get_logger, shows_progress
from minisgl.models.config import ModelConfig
from minisgl.models.decoder import Decoder
from minisgl.models.families import Family
from minisgl.models.files import find_files, open_safetensors, some
from minisgl.models.filling import PIECE, RandomWeights, fill
from minisgl.models.int_weights import IntCheckpoint
from minisgl.models.quantization import EMBEDDING, HEAD, Choice, Quantization
from minisgl.parallel import Communicator

if TYPE_CHECKING:
    from minisgl.gguf.weights import GgufWeights

log = get_logger(__name__)

OPENED_FOR = 2**22  # weights: what is read of a file is this process's memory until it is closed

T = TypeVar("T")
# A safetensors file, or what is read like an open one.
Source: TypeAlias = "Path | GgufWeights | IntCheckpoint | RandomWeights"
Stored = dict[str, tuple[Source, str]]  # weight -> its file, and its name there


FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them


def load_model(
    config: ModelConfig,
    path: Path | None,
    at: Placement,
    seed: int = 0,
    quantization: Quantization | None = None,
) -> Decoder:
    """Build this rank's part of the model and fill its weights, cast to the placement's dtype.

    Each layer is packed as soon as it is full, so little is held besides. path: a directory of
    safetensors files, or a GGUF file; without one, weights are random and depend on `seed` and
    their names only. A checkpoint may hold a head that its config ties: the model's own config says
    which it is. Without `quantization` all weights are floats. Raises ValueError naming the tensors
    for weights that are unknown, missing or of another shape, before anything is allocated, and for
    pickle checkpoints.
    """
    stored, groups = {}, {}
    if path is not None:
        stored = _find_weights(config.family, _sources(config, path))
        if config.tied_embeddings and f"{HEAD}.weight" in stored:
            config = _settle_head(config, stored)
        groups = _check(Decoder(config, replace(at, device=torch.device("meta"))), stored)
    asked = quantization or Quantization()
    choice = Choice(asked, groups)
    activations = "int8" if asked.int8_activations else "float"
    decoder = Decoder(config, replace(at, group=choice.group, activations=activations))
    choice.report()
    if path is None:
        source = RandomWeights({w.name: w.shape for w in decoder.weights()}, seed, at.device)
        stored = {name: (source, name) for name in source.keys()}  # noqa: SIM118
    for block in progress(decoder.blocks(), "loading weights", "layer"):
        _fill(block, stored, asked)
        block.pack()
        give_back_freed_memory()  # what lies between the pieces that stay adds up
    return decoder


def progress(items: Sequence[T], what: str, unit: str) -> Iterable[T]:
    """`items`, with a bar on a terminal that shows which has come."""
    hidden = not shows_progress()
    return tqdm(items, desc=what, unit=unit, leave=False, disable=hidden)  # type: ignore[no-any-return]


def checkpoint_name(family: Family, name: str) -> str | None:
    """The weight a checkpoint's tensor is, in the Llama convention; None for what is not needed."""
    ignored = name.removeprefix("model.").startswith(family.ignored)
    if ignored or name.endswith(".rotary_emb.inv_freq"):
        return None
    for old, new in family.renames:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _sources(config: ModelConfig, path: Path) -> Sequence[Source]:
    if path.suffix != ".gguf":
        files = find_files(path)
        return files if config.int_format is None else [IntCheckpoint(files, config.int_format)]
    from minisgl.gguf.config import read_weights
    from minisgl.gguf.header import read_gguf

    return [read_weights(read_gguf(path))]


def _open(source: Source) -> Any:
    return open_safetensors(source) if isinstance(source, Path) else source


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
    head, embedding = stored.pop(f"{HEAD}.weight"), f"{EMBEDDING}.weight"
    if embedding not in stored:
        stored[embedding] = head
    elif not _are_equal(head, stored[embedding]):
        log.warning("the config ties lm_head to the embedding, but they differ: both are used")
        stored[f"{HEAD}.weight"] = head
        return replace(config, tied_embeddings=False)
    return config


def _are_equal(one: tuple[Source, str], other: tuple[Source, str]) -> bool:
    """Whether two matrices are, some rows after others: those in codes become floats for it."""
    with _open(one[0]) as ours, _open(other[0]) as theirs:
        both = ours.get_slice(one[1]), theirs.get_slice(other[1])
        shape, other_shape = (tuple(each.get_shape()) for each in both)
        if shape != other_shape or len(shape) != 2 or 0 in shape:
            return False  # the check of shapes names it
        n, step = shape[0], max(1, PIECE // shape[1])
        return all(
            torch.equal(*(torch.as_tensor(each[at : min(at + step, n), :]) for each in both))
            for at in range(0, n, step)
        )


def _adds_nothing(name: str, stored: Stored, weights: Mapping[str, Weight]) -> bool:
    """Whether it is the bias, of zeros, of a matrix in codes that has none in this family: some
    tools write one for each matrix."""
    matrix = f"{name.removesuffix('bias')}weight"
    if matrix == name or matrix not in weights or matrix not in stored:
        return False
    source, inside = stored[name]
    if not isinstance(source, IntCheckpoint) or stored[matrix][1] not in source.matrices:
        return False
    return not torch.as_tensor(source.get_slice(inside)[:]).any()


def _check(wanted: Decoder, stored: Stored) -> dict[str, int]:
    """The group sizes of the matrices that are stored in codes. Forgets what adds nothing. Raises
    ValueError where the stored tensors are not those of the model."""
    weights = {weight.name: weight for weight in wanted.weights()}
    for name in [name for name in stored.keys() - weights if _adds_nothing(name, stored, weights)]:
        del stored[name]
    if unknown := [inside for name, (_, inside) in stored.items() if name not in weights]:
        raise ValueError(f"unknown weights for {wanted.config.architecture}: {some(unknown)}")
    if missing := weights.keys() - stored.keys():
        raise ValueError(f"weights missing from the checkpoint: {some(sorted(missing))}")
    groups = {}
    for file, own in groupby(_in_order(stored, stored), lambda name: stored[name][0]):
        with _open(file) as tensors:
            for name in own:
                tensor = tensors.get_slice(inside := stored[name][1])
                shape = tuple(tensor.get_shape())
                if shape != (asked := weights[name].shape):
                    wanted_shape = f"the config asks for {asked}"
                    raise ValueError(f"{file.name}: {inside} has shape {shape}, {wanted_shape}")
                if (group := getattr(tensor, "group", None)) is not None:
                    groups[name.removesuffix(".weight")] = group
                elif (kind := getattr(tensor, "get_dtype", lambda: "F32")()) not in FLOATS:
                    what = f"has the type {kind}, and nothing says what its codes stand for"
                    raise ValueError(f"{file.name}: {inside} {what}; floats are {list(FLOATS)}")
    return groups


def _fill(block: Block, stored: Stored, asked: Quantization) -> None:
    weights = {weight.name: weight for weight in block.weights()}
    parts = [p for name in _in_order(weights, stored) for p in weights[name].parts(OPENED_FOR)]
    read = accumulate((math.prod(part.target.shape) for part in parts), initial=0)
    order = zip(parts, (so_far // OPENED_FOR for so_far in read), strict=False)
    for (file, _), some_of in groupby(order, lambda at: (stored[at[0].name][0], at[1])):
        with _open(file) as tensors:
            for part, _ in some_of:
                bits = asked.bits(part.name.removesuffix(".weight"))
                fill(part, tensors.get_slice(stored[part.name][1]), bits)


def _in_order(names: Iterable[str], stored: Stored) -> list[str]:
    """As they lie in the files."""
    return sorted(names, key=lambda name: (stored[name][0].name, stored[name][1]))


def check_shares(config: ModelConfig, ranks: int) -> None:
    """Raises ValueError where `ranks` ranks cannot share the model. Allocates nothing."""
    try:
        Decoder(config, Placement(torch.float32, torch.device("meta"), Communicator(0, ranks)))
    except ValueError as error:
        raise ValueError(f"tp_size must divide what ranks share, got {ranks}: {error}") from error
