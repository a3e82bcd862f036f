"""What rounding weights to 8 and 4 bits loses: perplexity, and how often the likeliest token stays.

    python -m benchmarks.quantization                      # the bundled model
    python -m benchmarks.quantization --model smollm2

A text of our own is read once by each form of one model, beginning with bf16. A GGUF file's weights
are made bf16 first, which says little where the file has 4 bits itself: rounding to groups like its
own finds its codes again, and to others loses more than from floats. Agreement is the share of
positions where the likeliest next token is that of bf16. The last line is JSON.
"""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from minisgl import LLM, SamplingParams
from minisgl.build import BUNDLED_MODEL
from minisgl.models.hub import model_directory
from minisgl.server.tokenizer import Tokenizer

# A text of our own. Its numbers have one digit: transformers' reading of a GGUF file does not cut
# longer ones into digits, as SmolLM2's own tokenizer does.
HARBOUR = """
The harbour was quiet when the ferry came in. A woman with a red umbrella stood on the pier and
counted the crates, one after another, while the captain waited for her signature. It had rained
since the morning, and the water was the colour of slate. Nobody spoke. When she had finished, she
folded the paper, put it into her coat, and said that two crates were missing. The captain shook his
head. He had loaded them himself, he said, and nobody had gone below since they left the island. So
they went down together, with a lamp, to look for what had been lost between the two shores.
"""
TEXT = f"""{HARBOUR}
Bread needs flour, water, salt and time. Mix the flour with most of the water and let it rest for
half an hour before you add the salt and the yeast. Fold the dough a few times while it rises, and
do not hurry: a cool room and a long night give more taste than a warm oven does. Shape it gently,
cut the top with a sharp knife, and bake it until the crust is dark and sounds hollow.
"""
NONE = {"quantization": "none"}
Flags = dict[str, Any]


def forms() -> list[tuple[str, Flags]]:
    exact: Flags = NONE | {"dtype": "float32"}  # how much of a difference is noise of bf16
    found: list[tuple[str, Flags]] = [("bf16", NONE), ("bf16, computed in fp32", exact)]
    for bits in ("int8", "int4"):
        for group in (32, 128):
            for head in ("none", "int8", "int4"):
                for activations in ("none", "int8"):
                    flags: Flags = {"quantization": bits, "quantization_head": head}
                    flags |= {"quantization_group": group, "quantized_activations": activations}
                    name = f"{bits}, groups of {group}, head {head}, activations {activations}"
                    found.append((name, flags))
    return found


def floats_of(path: Path, folder: Path) -> Path:
    """The model, or what it is in bf16 where it is a GGUF file."""
    if path.suffix != ".gguf":
        return path
    from minisgl.gguf.config import read_config, read_weights
    from minisgl.gguf.header import read_gguf

    file = read_gguf(path)
    (folder / "config.json").write_text(json.dumps(read_config(file)[0]))
    tensors = read_weights(file)
    whole = {}
    for name in tensors.keys():  # noqa: SIM118 (the file is not a mapping)
        stored = tensors.get_slice(name)
        everything = tuple(slice(None) for _ in stored.get_shape())
        whole[name] = torch.from_numpy(stored[everything].copy()).bfloat16()
    save_file(whole, folder / "model.safetensors")
    return folder


def read(path: Path, ids: list[int], flags: Flags) -> tuple[float, list[int]]:
    """Perplexity, and the likeliest token at each position."""
    options: Flags = {"device": "cpu", "dtype": "bfloat16", "log_level": "error"} | flags
    with LLM(str(path), max_total_tokens=1024, disable_cuda_graph=True, **options) as llm:
        params = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0.0)
        entries = llm.generate([ids], params, use_tqdm=False)[0].prompt_logprobs
    known = [entry for entry in entries or [] if entry is not None]
    loss = -sum(entry.logprob for entry in known) / len(known)
    return math.exp(loss), [entry.top_ids[0] for entry in known]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="directory, GGUF file or hub id; the bundled when absent")
    args = parser.parse_args()
    path = BUNDLED_MODEL if args.model is None else model_directory(args.model)
    ids, rows, base = Tokenizer.from_directory(path).encode(TEXT), [], None
    print(f"{'weights':58} {'perplexity':>10} {'change':>7} {'agreement':>9}")
    with tempfile.TemporaryDirectory() as folder:
        floats = floats_of(path, Path(folder))
        for name, flags in forms():
            perplexity, tokens = read(floats, ids, flags)
            base = base or (perplexity, tokens)
            same = sum(a == b for a, b in zip(tokens, base[1], strict=True)) / len(tokens)
            change = perplexity / base[0] - 1
            print(f"{name:58} {perplexity:10.3f} {change:+7.2%} {same:9.1%}", flush=True)
            rows.append({"weights": name, "perplexity": perplexity, "agreement": same})
    print(json.dumps({"model": args.model or "bundled", "tokens": len(ids), "rows": rows}))


if __name__ == "__main__":
    main()
