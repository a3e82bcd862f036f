"""`python -m minisgl.chat`: a conversation in the terminal, with a server or an engine of its own.

python -m minisgl.chat                                  # the bundled model, in this process
python -m minisgl.chat --model Qwen/Qwen3-0.6B
python -m minisgl.chat --url http://127.0.0.1:30000     # any OpenAI-compatible server
"""

import contextlib
import http.client
import json
import sys
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from minisgl.config import EngineConfig
from minisgl.flags import flags_parser, read_flags
from minisgl.log import configure

HELP = (
    "Ctrl-C stops an answer, /reset forgets the conversation, /save FILE keeps it in a file, "
    "/exit or Ctrl-D ends."
)
OUTGROWN = "context length"  # in a server's refusal of a conversation that is too long
HELP_PROFILE = "/profile starts a profile; the next /profile ends and writes it."

Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class Options:
    """The flags of a chat besides the engine's."""

    url: str | None = None
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None


class Partner(Protocol):
    """What answers: a server or an engine."""

    def answer(self, messages: Conversation) -> Generator[str, None, None]:
        """The pieces of an answer. Raises ValueError or RuntimeError saying why there is none."""

    def profile(self) -> str:
        """Start a profile or end the one that runs; what came of it. ValueError: why not."""


class RemotePartner:
    """A server at `url`, with or without /v1 at its end."""

    def __init__(self, options: Options) -> None:
        url = urlsplit(options.url or "")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"--url must be like http://127.0.0.1:30000, got {options.url!r}")
        self._url = url
        self._path = url.path.rstrip("/").removesuffix("/v1") + "/v1"
        self._options = options
        with closing(self._request("GET", "/models", None)) as response, _plain_errors(url.netloc):
            self._model: str = json.load(response)["data"][0]["id"]

    def answer(self, messages: Conversation) -> Generator[str, None, None]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": messages,
            "stream": True,
        }
        for name in ("temperature", "max_tokens"):
            if (value := getattr(self._options, name)) is not None:
                body[name] = value
        with (
            closing(self._request("POST", "/chat/completions", body)) as response,
            _plain_errors(self._url.netloc),
        ):
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if data == "[DONE]":
                    return
                chunk: dict[str, Any] = json.loads(data) if data else {"choices": ()}
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""
            raise ConnectionError("the stream ended before the answer did")

    def profile(self) -> str:
        raise ValueError("profile a server by POST /profile/start and /profile/stop")

    def _request(self, method: str, path: str, body: Any) -> http.client.HTTPResponse:
        secure = self._url.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        content = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json", "Connection": "close"}
        with _plain_errors(self._url.netloc):
            connection = kind(self._url.netloc)
            connection.request(method, self._path + path, content, headers)
            response = connection.getresponse()
            if response.status == 200:
                return response
            said = response.read().decode(errors="replace")
        with contextlib.suppress(ValueError, LookupError, TypeError):
            said = json.loads(said)["error"]["message"]
        raise RuntimeError(f"{self._url.netloc} answered {response.status}: {said}")


@contextlib.contextmanager
def _plain_errors(server: str) -> Generator[None, None, None]:
    """RuntimeError for whatever keeps `server` from answering, or is no answer of OpenAI's API."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise RuntimeError(f"no answer from {server}: {error or type(error).__name__}") from error


class LocalPartner:
    """An engine in this process."""

    def __init__(self, config: EngineConfig, options: Options) -> None:
        from minisgl.core.request import SamplingParams
        from minisgl.llm import LLM

        self._params = SamplingParams(
            temperature=options.temperature, max_tokens=options.max_tokens
        )
        self._llm = LLM(**asdict(config))
        self._profiling = False

    def answer(self, messages: Conversation) -> Generator[str, None, None]:
        prompt = self._llm.tokenizer.encode_chat(messages)
        with closing(self._llm.stream(prompt, self._params)) as pieces:
            yield from pieces

    def profile(self) -> str:
        if self._profiling:
            self._profiling = False
            return "\n".join(self._llm.stop_profile())
        directory = self._llm.start_profile()
        self._profiling = True
        return f"profiling into {directory} until the next /profile"

    def __enter__(self) -> "LocalPartner":
        return self

    def __exit__(self, *error: object) -> None:
        self._llm.close()


def converse(partner: Partner, system: str | None) -> None:
    """Read, answer, until the input ends. What could not be answered is forgotten.

    The first Ctrl-C at a prompt says what a second one does: it may have been meant for an answer
    that has just ended.
    """
    start: Conversation = [{"role": "system", "content": system}] if system else []
    messages, file, interrupted = list(start), "", False
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            kept = f"kept in {file}" if file else "not kept; /save FILE keeps it"
            print(f"\n{'' if interrupted else 'Ctrl-C again ends. '}The conversation is {kept}.")
            if interrupted:
                return
            interrupted = True
            continue
        interrupted = False
        if said == "/exit":
            return
        if said == "/reset":
            messages, file = list(start), ""
        elif said.startswith("/save "):
            file = _save(messages, said.removeprefix("/save ").strip())
        elif said == "/profile":
            try:
                print(partner.profile())
            except ValueError as error:
                print(f"minisgl.chat: {error}", file=sys.stderr)
        elif said:
            answer = _show(partner, [*messages, {"role": "user", "content": said}])
            if answer is not None:
                messages.append({"role": "user", "content": said})
                messages.append({"role": "assistant", "content": answer})
                file = file and _save(messages, file)


def _save(messages: Conversation, file: str) -> str:
    """Write the conversation to `file`, as the API takes it; returns `file`, or "" if it failed."""
    try:
        Path(file).write_text(json.dumps(messages, ensure_ascii=False, indent=1) + "\n", "utf-8")
    except OSError as error:
        print(f"minisgl.chat: the conversation is not kept: {error}", file=sys.stderr)
        return ""
    return file


def _show(partner: Partner, messages: Conversation) -> str | None:
    """Print an answer as it comes and return it: up to a Ctrl-C, or None where there is none."""
    pieces: list[str] = []
    try:
        with closing(partner.answer(messages)) as answer:
            for piece in answer:
                pieces.append(piece)
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print(" ...", end="")
    except (ValueError, RuntimeError) as error:
        hint = "\n/reset forgets the conversation." if OUTGROWN in str(error) else ""
        print(f"minisgl.chat: {error}{hint}", file=sys.stderr)
        return None
    print()
    return "".join(pieces)


def main(args: Sequence[str] | None = None) -> int:
    parser = flags_parser(EngineConfig, "minisgl.chat", "Chat with a model in the terminal.")
    parser.add_argument("--url", help="a server to talk to, instead of an engine in this process")
    parser.add_argument("--system", help="system message of the conversation")
    parser.add_argument("--temperature", type=float, help="absent: the model's own")
    parser.add_argument("--max-tokens", type=int, help="longest answer")
    config, others = read_flags(parser, EngineConfig, args)
    options = Options(**others)
    if options.url is not None and config != EngineConfig():
        parser.error("--url cannot be combined with flags of the engine: give those to the server")
    configure("warning" if config.log_level == "info" else config.log_level)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing)
    try:
        partner = _partner(config, options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"minisgl.chat: {error}", file=sys.stderr)
        return 1
    print(HELP)
    if config.profile_dir is not None:
        print(HELP_PROFILE)
    with partner as ready:
        converse(ready, options.system)
    return 0


def _partner(config: EngineConfig, options: Options) -> AbstractContextManager[Partner]:
    if options.url is not None:
        return contextlib.nullcontext(RemotePartner(options))
    return LocalPartner(config, options)


if __name__ == "__main__":
    sys.exit(main())
