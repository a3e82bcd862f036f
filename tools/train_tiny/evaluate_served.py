"""Tool calls of a model behind its server, which holds them to their schemas.

    python -m minisgl.serve --model DIR &
    python -m tools.train_tiny.evaluate_served --url http://127.0.0.1:30000

Asked is what `evaluate_tools` asks, greedily, with `tool_choice` auto, of tools of trained kinds.
A whole call fits its schema, for the grammar sees to that; it is strict where it has no argument
that the schema does not name, either. Prints the shares of such and of right answers where a call
is due, and of those without one where none is, then one JSON line.
"""

import argparse
import json
import random
import urllib.request
from typing import Any

from tools.train_tiny import evaluate_tools
from tools.train_tiny.evaluate_tools import Call, share
from tools.train_tiny.skills import Skill


def answer(url: str, found: list[Skill], text: str) -> tuple[list[Call], bool]:
    """The calls of the server's answer, and whether they are whole."""
    body = {
        "messages": [{"role": "user", "content": text}],
        "tools": [skill.tool for skill in found],
        "temperature": 0,
        "max_tokens": 256,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        choice = json.load(response)["choices"][0]
    functions = [call["function"] for call in choice["message"].get("tool_calls") or ()]
    whole = choice["finish_reason"] == "tool_calls"  # and not broken off
    calls = [(each["name"], json.loads(each["arguments"]) if whole else {}) for each in functions]
    return calls, whole


def due(url: str, count: int, verbose: bool) -> dict[str, float]:
    """Where a call is due."""
    fitting, strict, right = [], [], []
    for found, request in evaluate_tools.known_requests(random.Random("known tools"), count):
        calls, whole = answer(url, found, request.text)
        fitting.append(whole and bool(calls))
        strict.append(whole and bool(calls) and evaluate_tools.is_valid(calls, found))
        right.append(calls == list(request.calls))
        if not right[-1] and verbose:
            print(f"  wrong call {request.text!r} -> {calls}, not {request.calls}")
    return {"whole": share(fitting), "strict": share(strict), "right": share(right)}


def needless(url: str, count: int, verbose: bool) -> dict[str, float]:
    """Where none is due, the share of answers without one."""
    result = {}
    for name, asked in evaluate_tools.needless_requests(count).items():
        given = [answer(url, found, text)[0] for found, text in asked]
        result[name] = share([not calls for calls in given])
        for (_, text), calls in zip(asked, given, strict=True):
            if calls and verbose:
                print(f"  needless call {text!r} -> {calls}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:30000")
    parser.add_argument("--count", type=int, default=200, help="prompts of each kind")
    parser.add_argument("--verbose", action="store_true", help="print what was wrong")
    args = parser.parse_args()
    report: dict[str, Any] = {"calls": due(args.url, args.count, args.verbose)}
    report["no calls"] = needless(args.url, args.count, args.verbose)
    for title, row in report.items():
        print(title, *(f"{name} {value:.3f}" for name, value in row.items()), sep="\n  ")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
