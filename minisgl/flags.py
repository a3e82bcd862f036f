"""Command-line flags: one for each field of a config, and what other engines call the same.

An unknown flag is answered with the one that was meant. Flags that vLLM, SGLang and llama.cpp know
by another name stand in a table, because the nearest spelling often means something else.
"""

import argparse
import difflib
import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

from minisgl import __version__
from minisgl.config import EngineConfig

SIMILARITY = 0.8  # of a flag's spelling to one that exists, at least, for a hint

# Our flag -> what does the same in other engines.
ELSEWHERE = {
    "--model": "-m --model-id",
    "--chat-template": "--chat-template-file",
    "--served-model-name": "-a --alias",
    "--tp-size": "--tensor-parallel-size -tp",
    "--dist-init-addr": "--master-addr",
    "--context-length": "--max-model-len -c --ctx-size",
    "--max-running-requests": "--max-num-seqs -np --parallel",
    "--chunked-prefill-size": "--max-num-batched-tokens -ub --ubatch-size",
    "--page-size": "--block-size",
    "--quantization": "-q --torchao-config",
    "--quantization-head": "--output-tensor-type --token-embedding-type",
    "--mem-fraction-static": "--gpu-memory-utilization",
    "--schedule-policy": "--scheduling-policy --enable-priority-scheduling",
    "--disable-radix-cache": "--no-enable-prefix-caching",
    "--disable-cuda-graph": "--enforce-eager",
    "--cuda-graph-max-bs": "--max-cudagraph-capture-size --cuda-graph-bs",
    "--disable-overlap-schedule": "--no-async-scheduling",
    "--batch-invariant": "--enable-deterministic-inference",
    "--speculative-algorithm": "--speculative-config",
    "--speculative-draft-model": "--speculative-draft-model-path -md --model-draft",
    "--speculative-num-draft-tokens": "--num-speculative-tokens --draft --draft-max",
    "--speculative-ngram-min": "--speculative-ngram-min-match-window-size",
    "--speculative-ngram-max": "--speculative-ngram-max-match-window-size",
    "--sampling-defaults": "--generation-config --override-generation-config",
    "--log-level": "--uvicorn-log-level",
    "--reasoning-parser": "--reasoning-format",
}
OTHER_NAMES = {name: [ours] for ours, names in ELSEWHERE.items() for name in names.split()}
# Flags of other engines for what needs none here, or is done elsewhere.
ALWAYS = {
    "--enable-prefix-caching": "prefixes are always cached, without --disable-radix-cache",
    "--enable-chunked-prefill": "prompts are always computed in chunks of --chunked-prefill-size",
    "--async-scheduling": "steps always overlap, without --disable-overlap-schedule",
    "--enable-metrics": "/metrics always answers",
    "--metrics": "/metrics always answers",
    "--enable-auto-tool-choice": "tools may always be given, where --tool-call-parser finds a form",
    "--cont-batching": "requests are always batched continuously",
    "--guided-decoding-backend": "structured output is always there, by llguidance",
    "--grammar-backend": "structured output is always there, by llguidance",
    "--seed": "each request has a seed of its own, in its body",
    "--api-key": "no key is asked for: a proxy before the server can do that",
}

C = TypeVar("C", bound=EngineConfig)


class _Parser(argparse.ArgumentParser):
    """Exits with one line on what is wrong; for an unknown flag, the nearest that exists."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].split("=")[0].replace("_", "-")
            known = [option for action in self._actions for option in action.option_strings]
            near = [ours for ours in OTHER_NAMES.get(name, ()) if ours in known]
            near = near or difflib.get_close_matches(name, known, 1, SIMILARITY)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            hint = f"; {ALWAYS[name]}" if name in ALWAYS else hint
            self.error(f"unknown argument {unknown[0]}{hint}")
        return found

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists all flags)\n")


def flags_parser(
    config: type[EngineConfig], prog: str, description: str
) -> argparse.ArgumentParser:
    """A parser whose flags are the fields of `config`: `max_total_tokens` is --max-total-tokens."""
    parser = _Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"minisgl {__version__}")
    for item in fields(config):
        names = ["--" + item.name.replace("_", "-"), *item.metadata["aliases"]]
        parser.add_argument(*names, dest=item.name, help=_help(item), **_value(item))
    return parser


def _value(item: Field[Any]) -> dict[str, Any]:
    """How argparse reads a field: a switch, one of some words, or a value of its type."""
    kind = item.type
    if kind is bool:
        return {"action": "store_true"}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is types.UnionType:
        (kind,) = (part for part in get_args(kind) if part is not types.NoneType)
    return {"type": kind, "metavar": getattr(kind, "__name__", "value").upper()}


def _help(item: Field[Any]) -> str:
    text: str = item.metadata["help"].replace("%", "%%")
    if item.type is bool or item.default in (None, MISSING):
        return text
    return f"{text} (default: {item.default})"


def read_flags(
    parser: argparse.ArgumentParser, config: type[C], args: Sequence[str] | None
) -> tuple[C, dict[str, Any]]:
    """The frozen config that the flags ask for, and the flags that are no fields of it.

    Exits with status 2 where a value is wrong.
    """
    given = vars(parser.parse_args(args))
    names = {item.name for item in fields(config)}
    ours = {name: value for name, value in given.items() if name in names}
    others = {name: value for name, value in given.items() if name not in names}
    try:
        return config(**ours), others
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        parser.error(f"--{name.replace('_', '-')} {rest}" if name in names else str(error))
