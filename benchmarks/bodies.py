"""What huge bodies do to a server: how long /health waits meanwhile, and what memory they keep.

    python -m benchmarks.bodies                     # the bundled model, with a context of 131,072
    python -m benchmarks.bodies --url http://127.0.0.1:30000 --pid PID

Each body is sent by one client, then by four at once. All are refused: as too long, before they
are encoded or on the way, for what they ask, or for their number of values. "health" is the longest
that a request for it took, asked for again every 5 ms; "kept" is what the server's memory has grown
by three seconds after the answer. The last line is JSON.
"""

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import minisgl

WORDS = "The scheduler gives each running sequence a number of tokens, and 17 pages.\n"
CONTEXT = 131_072
SETTLE = 3.0  # seconds


def bodies() -> dict[str, bytes]:
    """Bodies by name; sizes are in bytes."""

    def words(size: int) -> str:
        return WORDS * (size // len(WORDS))

    def completion(prompt: Any, **more: Any) -> bytes:
        return json.dumps({"prompt": prompt} | more).encode()

    def chat(messages: list[dict[str, Any]]) -> bytes:
        return json.dumps({"messages": messages}).encode()

    big = 15 * 10**6
    return {
        "text, 300 KB, encoded": completion(words(300_000), max_tokens=CONTEXT),
        "text, 600 KB": completion(words(600_000)),
        "text, 4 MB": completion(words(4_000_000)),
        "text, 15 MB": completion(words(big)),
        "one word, 15 MB": completion("a" * big),
        "spaces, 15 MB": completion(" " * big),
        "chat, 15 MB": chat([{"role": "user", "content": words(big)}]),
        "19,000 messages": chat([{"role": "user", "content": WORDS}] * 19_000),
        "3,000,000 token ids": completion([17] * 3_000_000),
        "1,000,000 token ids": completion([1234] * 1_000_000),
        "5,000,000 lists": b'{"prompt": [' + b"[]," * (big // 3) + b"[]]}",
    }


def ask(host: str, method: str, path: str, body: bytes | None = None) -> int:
    """The status of an answer."""
    connection = http.client.HTTPConnection(host, timeout=120)
    connection.request(method, path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


def resident_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    (kb,) = (line.split()[1] for line in text.splitlines() if line.startswith("VmRSS"))
    return int(kb) / 1024


def longest_wait(host: str, work: Callable[[], None]) -> float:
    """Seconds that /health took at most while `work` ran."""
    done, waits = threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.005):
            started = time.perf_counter()
            ask(host, "GET", "/health")
            waits.append(time.perf_counter() - started)

    watching = threading.Thread(target=watch)
    watching.start()
    work()
    done.set()
    watching.join()
    return max(waits)


def measure(host: str, pid: int, body: bytes, clients: int) -> dict[str, float]:
    path = "/v1/chat/completions" if b'"messages"' in body[:20] else "/v1/completions"
    before, statuses = resident_mb(pid), []

    def send() -> None:
        threads = [
            threading.Thread(target=lambda: statuses.append(ask(host, "POST", path, body)))
            for _ in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    started = time.perf_counter()
    health = longest_wait(host, send)
    seconds = time.perf_counter() - started
    time.sleep(SETTLE)
    kept = resident_mb(pid) - before
    return {"status": statuses[0], "seconds": seconds, "health_ms": health * 1e3, "kept_mb": kept}


def long_model(folder: Path) -> Path:
    """The bundled model, said to have a longer context than it was trained for."""
    source = Path(minisgl.__file__).parent / "assets/tiny"
    for file in source.iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT}))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a server that runs already")
    parser.add_argument("--pid", type=int, help="its process")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.url:
            rows = run(urlsplit(args.url).netloc, args.pid)
        else:
            command = [sys.executable, "-m", "minisgl.serve", "--port=0", "--device=cpu"]
            command += [f"--model={long_model(Path(folder))}", f"--max-total-tokens={2 * CONTEXT}"]
            server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert server.stdout is not None
            try:
                line = next(line for line in server.stdout if "http://" in line)
                rows = run(line.split("http://")[1].split("/")[0], server.pid)
            finally:
                server.terminate()
                server.wait()
    print(json.dumps(rows))


def run(host: str, pid: int) -> list[dict[str, Any]]:
    rows = []
    print(
        f"{'body':<26}{'clients':>8}{'status':>8}{'seconds':>9}{'health, ms':>12}{'kept, MB':>10}"
    )
    for name, body in bodies().items():
        for clients in (1, 4):
            found = measure(host, pid, body, clients)
            status, seconds, health, kept = found.values()
            figures = f"{status:>8}{seconds:>9.2f}{health:>12.0f}{kept:>10.0f}"
            print(f"{name:<26}{clients:>8}{figures}", flush=True)
            rows.append({"body": name, "clients": clients} | found)
    return rows


if __name__ == "__main__":
    main()
