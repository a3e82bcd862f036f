"""python -m tests.gguf.fuzz SECONDS SEED FILE...: changes files at random and reads them.

Ends with an error at the first that is neither read nor refused by a ValueError that names it, that
takes long or more memory. Each case is told before it is tried, so that a crash shows which it was.
"""

import random
import resource
import struct
import sys
import time
from pathlib import Path

import torch

from minisgl.layers.weights import Placement
from minisgl.models.config import ModelConfig
from minisgl.models.loader import load_model
from minisgl.models.quantization import Quantization
from minisgl.server.tokenizer import Tokenizer

MEMORY = 2**29  # bytes beyond what the imports have taken
SECONDS = 5.0  # for one file
AT_BASE = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)


def changed(data: bytes, random_: random.Random) -> bytes:
    """The file cut off, or with some bits, numbers or stretches of it others; its header mostly."""
    if random_.random() < 0.2:
        return data[: random_.randrange(len(data))]
    found = bytearray(data)
    for _ in range(random_.choice((1, 1, 1, 2, 4, 16))):
        last = random_.choice((64, 1024, 4096, len(data)))
        at = random_.randrange(min(last, len(found)))
        kind = random_.random()
        if kind < 0.5:
            found[at] ^= 1 << random_.randrange(8)
        elif kind < 0.8:
            value = random_.choice(AT_BASE)
            size = random_.choice((4, 8))
            found[at : at + size] = struct.pack("<Q", value)[:size]
        elif kind < 0.9:
            found[at : at + random_.randrange(1, 64)] = b""
        else:
            begin = random_.randrange(len(data))
            found[at : at + 16] = data[begin : begin + 16]
    return bytes(found)


def read(path: Path) -> None:
    """All that a start reads of a file."""
    at, kept = Placement(torch.float32, torch.device("cpu")), Quantization("auto", "auto")
    load_model(ModelConfig.from_hf(path), path, at, quantization=kept)
    tokenizer = Tokenizer.from_directory(path)
    tokenizer.decode(tokenizer.encode("The 1st token, and 2 others\n"))


def main(seconds: float, seed: int, files: list[Path]) -> None:
    originals = [file.read_bytes() for file in files]
    for file in files:
        read(file)
    taken = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY,) * 2)
    path, cases, refused = files[0].parent / "changed.gguf", 0, 0
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        print(f"case {seed}", flush=True)
        random_ = random.Random(seed)
        path.write_bytes(changed(random_.choice(originals), random_))
        began = time.monotonic()
        try:
            read(path)
        except ValueError:
            refused += 1
        assert time.monotonic() - began < SECONDS, "it took too long"
        seed, cases = seed + 1, cases + 1
    print(f"{cases} files, {refused} refused")


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), [Path(name) for name in sys.argv[3:]])
