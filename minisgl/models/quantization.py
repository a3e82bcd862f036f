"""Which matrices of a model are held in 4 or 8 bits, and in groups of what size."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from minisgl.config import Bits
from minisgl.kernels.grouped_linear.weights import BLOCK
from minisgl.log import get_logger

log = get_logger(__name__)

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


@dataclass(frozen=True)
class Quantization:
    """What is asked for: none makes floats of all weights, auto leaves them as the checkpoint has
    them, int8 and int4 round to so many bits what the checkpoint has in floats."""

    weights: Bits = "none"
    head: Bits = "none"  # of the embedding and the head
    group: int = 32
    int8_activations: bool = False

    def bits(self, name: str) -> int:
        """Of a matrix that the checkpoint has as floats."""
        return 4 if self._asked(name) == "int4" else 8

    def _asked(self, name: str) -> Bits:
        return self.head if name in (HEAD, EMBEDDING) else self.weights


@dataclass
class Choice:
    """Chooses the groups of each matrix of a model, and remembers which it could not."""

    asked: Quantization
    stored: Mapping[str, int]  # by name the group size of a matrix that the checkpoint has in codes
    left: dict[str, str] = field(default_factory=dict)  # why what stays as floats
    kept: bool = False  # whether any matrix is as it is stored, in codes
    rounded: bool = False  # whether any is, or a part of it

    def group(self, names: Sequence[str], shape: Sequence[int]) -> int | None:
        """The group size of the matrix that is made of these, or None where it stays in floats.

        shape: this rank's [..., N, K]. A matrix of several is of one kind: of floats where one of
        its parts is stored so and is not to be rounded, and in the groups that divide all others'.
        """
        asked = self.asked._asked(names[0])
        groups = [self.stored.get(name) for name in names]
        if asked == "none" or (asked == "auto" and not any(groups)):
            return None
        why = ""
        if asked == "auto" and None in groups:
            why = f"the checkpoint has {names[groups.index(None)]} in floats"
        group = math.gcd(shape[-1], *(group or self.asked.group for group in groups))
        if group % BLOCK:
            why = f"a rank has {shape[-1]} inputs of it, in no whole groups of {BLOCK}"
        if why:
            self.left.update(dict.fromkeys(names, why))
            return None
        self.kept |= any(groups)
        self.rounded |= None in groups
        return group

    def report(self) -> None:
        """Log what stays as floats although it is quantised in the checkpoint, or was to be, what
        was asked for in vain, and that activations are rounded."""
        asked = {self.asked.weights, self.asked.head}
        if "auto" in asked and not (self.kept or self.left):
            log.warning("quantization auto: the checkpoint has no weights in codes")
        if asked & {"int8", "int4"} and not (self.rounded or self.left):
            log.warning(
                "quantization: nothing is rounded, as the checkpoint's matrices are in codes "
                "already and stay so, as with auto"
            )
        if self.asked.int8_activations and (self.kept or self.rounded):
            log.info(
                "activations are rounded to 8 bits where weights are in codes, which is faster; "
                "--quantized-activations none leaves them as they are"
            )
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            log.warning("not quantised: %s%s, as %s", names[0], more, why)
