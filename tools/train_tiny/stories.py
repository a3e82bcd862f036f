"""Little stories from templates: a hero walks from place to place, and each scene is one paragraph.

A story has a small state (hero, friend, place, thing carried), so the text stays consistent for as
long as one reads; it never has to end, and ends only where it is told to be short.
"""

import random
from dataclasses import dataclass

from tools.train_tiny import words

WORDS = words.WORDS["story"]
NAMES: dict[str, list[str]] = WORDS["names"]
PLACES: dict[str, str] = WORDS["places"]


@dataclass
class Story:
    """The state of a story; `scene` moves it on by one paragraph."""

    rng: random.Random
    kind: str
    trait: str
    hero: str
    pronoun: str
    friend: str
    place: str
    thing: str
    last: str = ""

    @staticmethod
    def begin(rng: random.Random) -> "Story":
        pronoun = rng.choice(("he", "she"))
        hero = rng.choice(NAMES[pronoun])
        friend = rng.choice([n for n in NAMES["he"] + NAMES["she"] if n != hero])
        kind, trait, thing = (
            rng.choice(WORDS["kinds"]),
            rng.choice(WORDS["traits"]),
            rng.choice(WORDS["things"]),
        )
        return Story(rng, kind, trait, hero, pronoun, friend, rng.choice(list(PLACES)), thing)

    def fill(self, template: str) -> str:
        he = self.pronoun
        his, him = ("his", "him") if he == "he" else ("her", "her")
        return template.format(
            time=self.rng.choice(WORDS["times"]),
            hero=self.hero,
            friend=self.friend,
            place=self.place,
            view=PLACES[self.place],
            thing=self.thing,
            food=self.rng.choice(WORDS["foods"]),
            kind=self.kind,
            trait=self.trait,
            he=he,
            He=he.capitalize(),
            his=his,
            His=his.capitalize(),
            him=him,
        )

    def opening(self) -> str:
        return self.fill(self.rng.choice(WORDS["openings"]))

    def meeting(self) -> str:
        rng, state = self.rng, (self.kind, self.trait)
        self.place = rng.choice(list(PLACES))
        self.kind, self.trait = rng.choice(WORDS["kinds"]), rng.choice(WORDS["traits"])
        text = self.fill(WORDS["meeting"])
        self.kind, self.trait = state
        return text

    def scene(self) -> str:
        """The next paragraph: some scenes move to another place or bring another thing."""
        rng = self.rng
        template = rng.choice([s for s in WORDS["scenes"] if s != self.last])
        self.last = template
        if "{place}" in template:
            self.place = rng.choice([p for p in PLACES if p != self.place])
        if "found a {thing}" in template:
            self.thing = rng.choice([t for t in WORDS["things"] if t != self.thing])
        kind = self.kind
        if "a {kind}" in template:
            self.kind = rng.choice([k for k in WORDS["kinds"] if k != kind])
        text = self.fill(template)
        self.kind = kind
        return text

    def ending(self) -> str:
        return self.fill(self.rng.choice(WORDS["endings"]))

    def paragraphs(self, scenes: int, end: bool) -> list[str]:
        texts = [self.opening(), self.meeting(), *(self.scene() for _ in range(scenes))]
        return [*texts, self.ending()] if end else texts


def plain_story(rng: random.Random, scenes: int) -> str:
    """A story of plain text that does not end."""
    return "\n\n".join(Story.begin(rng).paragraphs(scenes, end=False))


def told_story(rng: random.Random, scenes: int, end: bool) -> tuple[str, str]:
    """A request for a story and the story; without `end` it stops in the middle."""
    story = Story.begin(rng)
    request = story.fill(rng.choice(WORDS["short" if end else "long"]))
    return request, "\n\n".join(story.paragraphs(scenes, end))


def continued_story(rng: random.Random, given: int, scenes: int) -> tuple[str, str]:
    """A request with the first `given` paragraphs, and the scenes that follow."""
    texts = Story.begin(rng).paragraphs(given + scenes, end=True)
    cut = max(1, given)
    request = rng.choice(WORDS["continue"]).format(text="\n\n".join(texts[:cut]))
    return request, "\n\n".join(texts[cut:])
