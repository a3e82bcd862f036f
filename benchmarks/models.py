"""The model of a benchmark: a directory's, or one of a published model's sizes."""

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from minisgl.models.presets import PRESETS, QWEN3, decoder

if TYPE_CHECKING:  # a benchmark of starts times imports
    from minisgl.config import LoadFormat

# What --shape chooses from. "tiny" is for a try.
SHAPES = {"tiny": decoder("Qwen3", 2, 32, 4, 2, 16, 48, 131, **QWEN3 | {"eos_token_id": 1})}
# A llama of 4.2 million parameters, of whose step on a CPU little is arithmetic.
SHAPES["llama-4m"] = decoder(
    "Llama", 4, 256, 4, 2, 64, 768, 2048, max_position_embeddings=4096, rms_norm_eps=1e-6
)
SHAPES |= PRESETS


def add_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", help="directory or hub id; the bundled model when absent")
    source.add_argument("--shape", choices=SHAPES, help="a known model's sizes, random weights")
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"])


def name(args: argparse.Namespace) -> str:
    """What the options choose, for people."""
    return str(args.shape or args.model or "bundled")


@contextmanager
def chosen(args: argparse.Namespace) -> "Iterator[tuple[str | None, LoadFormat]]":
    """The options' model, None being the bundled one, and how it is loaded.

    Of a shape it is a directory with nothing but a config.json, which is there within the block.
    """
    if args.shape is None:
        yield args.model, args.load_format
        return
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(SHAPES[args.shape]))
        yield directory, "dummy"
