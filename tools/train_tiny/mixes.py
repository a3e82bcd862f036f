"""The training text: which documents, and how many of each kind.

The mixes follow each other as the model was taught: facts and tasks, then more of what takes
longest, at last tools and schemas.
"""

import random

from tools.train_tiny import corpus, knowledge, stories
from tools.train_tiny.corpus import TURNS, Sample, conversation, document
from tools.train_tiny.tool_chats import choice_chat, lines_sample, tool_chat

TOOLS_FROM = 2400  # the first step with tools


def long_sample(rng: random.Random) -> Sample:
    """About a context or more, which the trainer cuts: a story, plain or asked for, or a chat."""
    if rng.random() < 0.25:
        kinds = rng.choices(list(TURNS), (8, 2, 2, 1, 1, 1), k=24)
        return conversation("long chat", [TURNS[kind](rng) for kind in kinds], rng)
    if rng.random() < 0.5:
        return document("long story", stories.plain_story(rng, 100))
    return conversation("long story", [stories.told_story(rng, 100, end=False)], rng)


# Draws by document. Facts are short, so half of the tokens still come from the rest.
MIX: dict[str, float] = {
    "fact": 52,
    "addition": 14,
    "extraction": 16,
    "echo": 8,
    "unknown": 2,
    "story": 5,
    "chat": 6,
    "plain story": 2,
    "handbook": 1,
}
# What takes longest to become exact gets more of the later steps: sums first, then copying.
LATE_MIX = {**MIX, "addition": 26, "extraction": 30, "story": 3, "chat": 3, "plain story": 1}
LAST_MIX = {**LATE_MIX, "fact": 42, "addition": 8, "extraction": 48, "echo": 15}
# Tools and schemas beside all that was learnt before.
TOOL_MIX = {
    "tools": 26,
    "choice": 40,
    "lines": 30,
    "record": 18,
    "keyed record": 6,
    "fact": 32,
    "addition": 12,
    "extraction": 22,
    "echo": 6,
    "unknown": 3,
    "story": 2,
    "chat": 2,
    "plain story": 1,
    "handbook": 1,
}
# First what tools do is learnt to be compared with what is asked, with little of the rest.
LINES_MIX = {**{kind: share / 40 for kind, share in TOOL_MIX.items()}, "lines": 100}
# At last whole calls: which tool is known by then, and what is said is to be copied.
CALLS_MIX = {**TOOL_MIX, "tools": 65, "choice": 20, "lines": 12}
# And what was known before is not to be forgotten.
KEEPING_MIX = {**CALLS_MIX, "fact": 90, "addition": 32, "unknown": 5}
MIXES = (  # from which step on
    (TOOLS_FROM + 3200, KEEPING_MIX),
    (TOOLS_FROM + 2700, CALLS_MIX),
    (TOOLS_FROM + 400, TOOL_MIX),
    (TOOLS_FROM, LINES_MIX),
    (1680, LAST_MIX),
    (560, LATE_MIX),
    (0, MIX),
)


def mix_at(step: int) -> dict[str, float]:
    return next(mix for first, mix in MIXES if step >= first)


def sample(rng: random.Random, mix: dict[str, float] = MIX) -> Sample:
    """One document of the mix (long ones apart: the trainer gives them their own steps)."""
    kind = rng.choices(list(mix), list(mix.values()))[0]
    if kind in TURNS:
        return corpus.single(kind, rng)
    if kind == "tools":
        return tool_chat(rng)
    if kind == "choice":
        return choice_chat(rng)
    if kind == "lines":
        return lines_sample(rng)
    if kind == "record":
        return corpus.conversation(kind, [corpus.record_turn(rng)], rng)
    if kind == "keyed record":
        return corpus.keyed_record(rng)
    if kind == "chat":
        return corpus.several(rng)
    if kind == "plain story":
        return document(kind, stories.plain_story(rng, rng.randint(2, 6)))
    return document(kind, knowledge.handbook(rng, rng.randint(2, 6)) + corpus.DOCUMENT_END)
