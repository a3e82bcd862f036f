"""transformers in its own process: makes checkpoints, and says what it would have said.

One JSON request per line on standard input, one JSON answer per line on standard output:
{"make": case, "folder": f} -> null; {"folder": f, "sequences": [[prompt, output], ...]} -> for each
sequence the ids that greedy decoding gives at the positions of `output`, `output` being its input.
"""

import json
import os
import sys
from pathlib import Path

import torch
import transformers

from tests.world.checkpoints import make


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints must not look like an answer
    models: dict[str, transformers.PreTrainedModel] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        folder = asked["folder"]
        answer = None
        if "make" in asked:
            models[folder] = make(asked["make"], Path(folder))
        else:
            answer = []
            for prompt, output in asked["sequences"]:
                with torch.inference_mode():
                    logits = models[folder](torch.tensor([prompt + output])).logits[0]
                answer.append(logits[len(prompt) - 1 : -1].argmax(-1).tolist())
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
