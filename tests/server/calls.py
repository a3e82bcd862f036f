"""Calls to the server under test, as its clients make them."""

import time

MODEL = "test-model"
USER = [{"role": "user", "content": "hi"}]


def chat(client, **options):
    return client.chat.completions.create(model=MODEL, messages=USER, **options)


def complete(client, prompt="Once", **options):
    return client.completions.create(model=MODEL, prompt=prompt, **options)


def eventually(condition, timeout=5.0):
    """Whether `condition()` becomes true."""
    end = time.monotonic() + timeout
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def sse(response):
    """The events of a stream, as sent."""
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
