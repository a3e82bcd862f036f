"""Measure the bundled model: `python -m tools.train_tiny.evaluate [--model DIR] [--draft DIR]`.

Everything asked is new to the model: fact questions in sentence patterns that training never saw,
additions with a tenth of the pairs held out, extractions with names and cities unknown in that
combination (half of them unknown at all), from known and from held-out sentences. Agreement is
the share of draft tokens equal to the target's own, given the target's text, at temperature 0 and,
with the same noise for both, at 1. Prints a table, then one JSON line.
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from tools.train_tiny import corpus, evaluate_tools, knowledge, stories, tasks
from tools.train_tiny.evaluate_tools import share
from tools.train_tiny.generate import GREEDY, Sampling, agreement, generate
from tools.train_tiny.model import Qwen3, load
from tools.train_tiny.trainer import eos_ids

ASSETS = Path(__file__).parents[2] / "minisgl" / "assets"
Prompts = list[list[int]]


@dataclass(frozen=True)
class Bench:
    """A model under evaluation with its tokenizer."""

    model: Qwen3
    tokenizer: Tokenizer
    eos: list[int]

    def prompt(self, user: str) -> list[int]:
        text = f"{corpus.START}user\n{user}{corpus.END}\n{corpus.START}assistant\n"
        return self.tokenizer.encode(text).ids

    def answers(self, users: list[str], sampling: Sampling, limit: int = 96) -> list[str]:
        return self._generated([self.prompt(user) for user in users], sampling, limit)

    def replies(self, chats: list[str], sampling: Sampling, limit: int = 96) -> list[str]:
        """What follows conversations, which are texts up to the assistant's turn."""
        return self._generated([self.tokenizer.encode(chat).ids for chat in chats], sampling, limit)

    def _generated(self, prompts: Prompts, sampling: Sampling, limit: int) -> list[str]:
        outputs = generate(self.model, prompts, limit, self.eos, sampling)
        return [self.tokenizer.decode(ids) for ids in outputs]


def facts(bench: Bench, sampling: Sampling, verbose: bool) -> dict[str, float]:
    """Share of 200 held-out phrasings whose answer contains the key fact, in all and by kind."""
    asked = knowledge.held_out_questions(200, seed=0)
    texts = bench.answers([q.text for q in asked], sampling)
    hits = [q.key.lower() in text.lower() for q, text in zip(asked, texts, strict=True)]
    if verbose:
        for q, text, hit in zip(asked, texts, hits, strict=True):
            if not hit:
                print(f"  missed [{q.kind}] {q.text!r} -> {text!r}")
    kinds = sorted({q.kind for q in asked})
    by_kind = {
        k: share([h for q, h in zip(asked, hits, strict=True) if q.kind == k]) for k in kinds
    }
    return {"all": share(hits), **by_kind}


def additions(bench: Bench, sampling: Sampling, count: int, verbose: bool) -> dict[str, float]:
    """Share of right sums over 0-99: of seen pairs, held-out pairs, and in held-out wordings."""
    rng = random.Random("additions")
    pairs = [(a, b) for a in range(100) for b in range(100)]
    rng.shuffle(pairs)
    seen = [p for p in pairs if not tasks.is_held_out_pair(*p)][:count]
    kept = [p for p in pairs if tasks.is_held_out_pair(*p)][: count // 4]
    sets = {
        "seen pairs": (seen, tasks.WORDS["addition"]),
        "held-out pairs": (kept, tasks.WORDS["addition"]),
        "held-out wordings": (kept, tasks.WORDS["held_out_addition"]),
    }
    result = {}
    for name, (chosen, patterns) in sets.items():
        users = [rng.choice(patterns).format(a=a, b=b) for a, b in chosen]
        texts = bench.answers(users, sampling)
        right = [
            re.findall(r"\d+", t)[-1:] == [str(a + b)]
            for t, (a, b) in zip(texts, chosen, strict=True)
        ]
        result[name] = share(right)
        if verbose:
            wrong = [(u, t) for u, t, ok in zip(users, texts, right, strict=True) if not ok]
            for user, text in wrong[:12]:
                print(f"  wrong sum {user!r} -> {text!r}")
    return result


def extractions(
    bench: Bench, sampling: Sampling, new_patterns: bool, verbose: bool
) -> dict[str, float]:
    """200 extractions with new names: how many parse as JSON objects, how many values are right."""
    rng = random.Random("extractions")
    asked = [tasks.extraction(rng, new_names=True, new_patterns=new_patterns) for _ in range(200)]
    parsed, exact, values = 0, 0, []
    for e, text in zip(asked, bench.answers([e.request for e in asked], sampling), strict=True):
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            found = None
        if isinstance(found, dict):
            parsed += 1
        else:
            found = {}
        exact += found == e.values
        values += [found.get(key) == value for key, value in e.values.items()]
        if verbose and found != e.values:
            print(f"  wrong JSON {e.request!r} -> {text!r}")
    return {
        "parsed": parsed,
        "of": len(asked),
        "objects": exact / len(asked),
        "values": share(values),
    }


def long_story(bench: Bench, sampling: Sampling) -> dict[str, float]:
    """A story to the end of the context: share of words known from stories, distinct paragraphs."""
    rng = random.Random("words")
    known = set(
        re.findall(r"[a-z]+", " ".join(stories.plain_story(rng, 60) for _ in range(50)).lower())
    )
    prompt = bench.tokenizer.encode("Once upon a time").ids
    limit = bench.model.config.max_position_embeddings - len(prompt)
    (ids,) = generate(bench.model, [prompt], limit, [], sampling)
    text = "Once upon a time" + bench.tokenizer.decode(ids, skip_special_tokens=False)
    paragraphs = [p for p in text.split("\n\n") if p]
    words = re.findall(r"[a-z]+", text.lower())
    return {
        "tokens": len(ids),
        "known words": share([word in known for word in words]),
        "distinct paragraphs": len(set(paragraphs)) / len(paragraphs),
    }


def domains() -> dict[str, tuple[Callable[[random.Random], str], int]]:
    """Per domain: how to draw a user's message, and the longest answer."""

    def story(rng: random.Random) -> str:
        return corpus.story_turn(rng)[0]

    return {
        "facts": (lambda rng: rng.choice(knowledge.held_out_questions(200, 0)).text, 64),
        "additions": (lambda rng: tasks.addition(rng)[0], 64),
        "extraction": (
            lambda rng: tasks.extraction(rng, new_names=True, new_patterns=True).request,
            64,
        ),
        "stories": (story, 192),
        "other": (lambda rng: corpus.unknown_turn(rng)[0], 64),
    }


def agreements(bench: Bench, draft: Qwen3, sampling: Sampling, count: int) -> dict[str, float]:
    """Share of the draft's tokens equal to the target's, by domain and over all tokens."""
    result, everything = {}, []
    for name, (draw, limit) in domains().items():
        rng = random.Random(f"agreement-{name}")
        prompts = [bench.prompt(draw(rng)) for _ in range(count)]
        outputs = generate(bench.model, prompts, limit, bench.eos, sampling)
        hits: list[bool] = []
        for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
            hits += agreement(draft, prompt, output, i, sampling)
        result[name] = share(hits)
        everything += hits
    return {**result, "all": share(everything)}


def table(title: str, rows: dict[str, dict[str, float]]) -> None:
    columns = list(next(iter(rows.values())))
    print(f"\n{title}\n{'':14}" + "".join(f"{column:>20}" for column in columns))
    for name, row in rows.items():
        print(f"{name:14}" + "".join(f"{row[column]:>20.4g}" for column in columns))


TOOL_MEASURES: dict[str, Callable[[Bench, Sampling, bool], dict[str, float]]] = {
    "Calls where one is due, of new tools": evaluate_tools.new_tool_calls,
    "Calls where one is due, of known tools": evaluate_tools.known_tool_calls,
    "No call where none is due": evaluate_tools.needless_calls,
    "What a tool answered, said": evaluate_tools.said_answers,
    "Answers by new keys and schemas": evaluate_tools.by_schema,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ASSETS / "tiny")
    parser.add_argument("--draft", type=Path, default=ASSETS / "tiny-draft")
    parser.add_argument("--additions", type=int, default=1000, help="seen pairs to ask")
    parser.add_argument("--agreement", type=int, default=64, help="prompts per domain")
    parser.add_argument("--no-draft", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="print what was wrong")
    args = parser.parse_args()
    tok = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    bench = Bench(load(args.model), tok, eos_ids(tok))
    modes = {"greedy": GREEDY, "temperature 1": Sampling(1, seed=1)}
    report: dict[str, dict[str, dict[str, float]]] = {}
    with torch.inference_mode():
        report["facts"] = {m: facts(bench, s, args.verbose) for m, s in modes.items()}
        table("Held-out phrasings with the key fact in the answer", report["facts"])
        report["additions"] = {
            m: additions(bench, s, args.additions, args.verbose) for m, s in modes.items()
        }
        table("Right sums over 0-99", report["additions"])
        for name, new in (("extraction", False), ("extraction, new sentences", True)):
            report[name] = {m: extractions(bench, s, new, args.verbose) for m, s in modes.items()}
            table(f"JSON {name}: new names, right whole objects and values", report[name])
        report["story"] = {m: long_story(bench, s) for m, s in modes.items()}
        table("A story to the end of the context", report["story"])
        for title, measure in TOOL_MEASURES.items():
            report[title] = {m: measure(bench, s, args.verbose) for m, s in modes.items()}
            table(title, report[title])
        if not args.no_draft:
            draft = load(args.draft)
            report["agreement"] = {
                m: agreements(bench, draft, s, args.agreement) for m, s in modes.items()
            }
            table("Draft tokens equal to the target's", report["agreement"])
    print(json.dumps(report))


if __name__ == "__main__":
    main()
