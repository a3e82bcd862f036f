"""`python -m minisgl.chat`: a conversation in the terminal, with a server or an engine of its own.

python -m minisgl.chat                                  # the bundled model, in this process
python -m minisgl.chat --model Qwen/Qwen3-0.6B
python -m minisgl.chat --url http://127.0.0.1:30000     # any OpenAI-compatible server

What a model reasons before its answer is shown dimmed in a terminal, and left out elsewhere; it is
no part of the conversation.
"""

import contextlib
import http.client
import json
import re
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from minisgl.config import EngineConfig
from minisgl.flags import flags_parser, read_flags
from minisgl.log import configure

HELP = (
    "Ctrl-C stops an answer, /reset forgets the conversation, /save FILE keeps it in a file, "
    "/help lists the commands, /exit or Ctrl-D ends."
)
COMMAND = re.compile(r"/\w*(?:\s.*)?")  # a path or a comment is none
COMMANDS = "/help, /reset, /save FILE, /profile, /exit"
OUTGROWN = "context length"  # in a server's refusal of a conversation that is too long
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
HELP_PROFILE = "/profile starts a profile; the next /profile ends and writes it."

Conversation = list[dict[str, str]]
Sampling = dict[str, Any]  # the flags of a chat that are fields of a request


class Piece(NamedTuple):
    """Some text of an answer, or of what a model reasons before it."""

    text: str
    is_reasoning: bool = False


class RemotePartner:
    """A server at `url`, with or without /v1 at its end."""

    def __init__(self, url: str, sampling: Sampling) -> None:
        self._url = urlsplit(url)
        if self._url.scheme not in ("http", "https") or not self._url.hostname:
            raise ValueError(f"--url must be like http://127.0.0.1:30000, got {url!r}")
        self._sampling = sampling
        with self._asked("GET", "/models") as response:
            self._model: str = json.load(response)["data"][0]["id"]

    def answer(self, messages: Conversation) -> Generator[Piece, None, None]:
        body = {"model": self._model, "messages": messages, "stream": True, **self._sampling}
        with self._asked("POST", "/chat/completions", json.dumps(body)) as response:
            for line in response:
                data = line.decode().strip().removeprefix("data: ")
                if data == "[DONE]":
                    return
                chunk: dict[str, Any] = json.loads(data) if data else {"choices": ()}
                if "error" in chunk:
                    raise RuntimeError(chunk["error"]["message"])
                for choice in chunk["choices"]:
                    delta = choice["delta"]
                    for name in ("reasoning_content", "content"):
                        if text := delta.get(name):
                            yield Piece(text, name != "content")
            raise ConnectionError("the stream ended before the answer did")

    def profile(self) -> str:
        raise ValueError("profile a server by POST /profile/start and /profile/stop")

    @contextlib.contextmanager
    def _asked(
        self, method: str, path: str, body: str | None = None
    ) -> Generator[http.client.HTTPResponse, None, None]:
        """The answer to a request. RuntimeError for a refusal, and for whatever keeps the server
        from answering or is no answer of OpenAI's API, until the end of the context."""
        server, secure = self._url.netloc, self._url.scheme == "https"
        path = self._url.path.rstrip("/").removesuffix("/v1") + "/v1" + path
        headers = {"Content-Type": "application/json", "Connection": "close"}
        try:
            kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
            with closing(kind(server)) as connection:
                connection.request(method, path, body, headers)
                response = connection.getresponse()
                if response.status != 200:
                    said = response.read().decode(errors="replace")
                    with contextlib.suppress(ValueError, LookupError, TypeError):
                        said = json.loads(said)["error"]["message"]
                    raise RuntimeError(f"{server} answered {response.status}: {said}")
                yield response
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise RuntimeError(
                f"no answer from {server}: {error or type(error).__name__}"
            ) from error


class LocalPartner:
    """An engine in this process, which ends with it. Reasoning is told apart where its marks are
    text, and no special tokens."""

    def __init__(self, config: EngineConfig, sampling: Sampling) -> None:
        from minisgl.core.request import SamplingParams
        from minisgl.llm import LLM

        self._params = SamplingParams(**sampling)
        self._llm = LLM(**asdict(config))
        self._profiling = False

    def answer(self, messages: Conversation) -> Generator[Piece, None, None]:
        from minisgl.server.answer import REASONING_FORMATS, AnswerParser, chosen
        from minisgl.server.tools import Tools, answer_form

        tokenizer = self._llm.tokenizer
        text, frame = tokenizer.render_both(messages)
        template = tokenizer.chat_template.source if tokenizer.chat_template else ""
        marks = chosen("auto", REASONING_FORMATS, template)
        parser = AnswerParser(answer_form(Tools(), frame, None, marks))
        prompt = tokenizer.encode(text, add_special_tokens=False)
        with closing(self._llm.stream(prompt, self._params)) as pieces:
            for piece in chain(pieces, [None]):  # and its end
                for news in parser.end() if piece is None else parser.push(piece):
                    yield Piece(news.text, news.kind == "reasoning")

    def profile(self) -> str:
        if self._profiling:
            self._profiling = False
            return "\n".join(self._llm.stop_profile())
        directory = self._llm.start_profile()
        self._profiling = True
        return f"profiling into {directory} until the next /profile"


def converse(partner: RemotePartner | LocalPartner, system: str | None) -> None:
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
        elif said == "/help":
            print(f"{HELP}\n{HELP_PROFILE}")
        elif said == "/profile":
            try:
                print(partner.profile())
            except ValueError as error:
                print(f"minisgl.chat: {error}", file=sys.stderr)
        elif COMMAND.fullmatch(said):
            print(f"minisgl.chat: {said}: the commands are {COMMANDS}", file=sys.stderr)
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


def _show(partner: RemotePartner | LocalPartner, messages: Conversation) -> str | None:
    """Print an answer as it comes and return it: up to a Ctrl-C, or None where there is none."""
    pieces: list[str] = []
    dims, reasoned = sys.stdout.isatty(), False
    try:
        with closing(partner.answer(messages)) as answer:
            for text, is_reasoning in answer:
                if not is_reasoning:
                    pieces.append(text)
                    print("\n\n" * reasoned + text, end="", flush=True)
                elif dims:
                    print(f"{DIM}{text}{PLAIN}", end="", flush=True)
                reasoned = is_reasoning and dims
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
    url, system = others.pop("url", None), others.pop("system", None)
    if url is not None and config != EngineConfig():
        parser.error("--url cannot be combined with flags of the engine: give those to the server")
    configure("warning" if config.log_level == "info" else config.log_level)
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing)
    try:
        partner = LocalPartner(config, others) if url is None else RemotePartner(url, others)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"minisgl.chat: {error}", file=sys.stderr)
        return 1
    print(HELP)
    if config.profile_dir is not None:
        print(HELP_PROFILE)
    converse(partner, system)
    return 0


if __name__ == "__main__":
    sys.exit(main())
