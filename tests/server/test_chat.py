"""`python -m minisgl.chat` against a server, fed through its standard input."""

import io
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from minisgl import chat
from minisgl.build import BUNDLED_MODEL
from minisgl.config import EngineConfig
from minisgl.server.tokenizer import Tokenizer


@pytest.fixture
def talk(server, monkeypatch, capsys):
    def run(*lines, flags=()):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = chat.main(["--url", server.url, *flags])
        return code, *capsys.readouterr()

    return run


def said(engine):
    """The conversations that reached the engine, as text."""
    decode = engine.model.tokenizer.decode
    return [decode(request.prompt_token_ids) for request in engine.requests]


def test_a_conversation_grows_until_it_is_reset(talk, engine):
    engine.text = "größer 🚀"
    code, out, err = talk("eins", "zwei", "/reset", "drei", flags=["--system", "kurz"])
    assert (code, err) == (0, "")
    assert out.count("größer 🚀\n") == 3
    first, second, third = said(engine)
    assert "system\nkurz" in first
    assert "eins" in second
    assert "größer 🚀" in second
    assert "eins" not in third
    assert "system\nkurz" in third


def test_commands_are_listed_and_unknown_ones_are_no_message(talk, engine):
    code, out, err = talk("/help", "/foo", "/save", "/resett x", "/usr/bin?", "/exit")
    assert code == 0
    assert out.count("/help lists the commands") == 2
    for said_ in ("/foo", "/save", "/resett x"):
        assert f"minisgl.chat: {said_}: the commands are /help, /reset, /save FILE" in err
    assert len(said(engine)) == 1
    assert "/usr/bin?" in said(engine)[0]


def test_flags_reach_the_server(talk, engine):
    talk("x", flags=["--temperature", "0", "--max-tokens", "3"])
    params = engine.requests[0].params
    assert (params.temperature, params.max_tokens) == (0.0, 3)


def test_what_could_not_be_answered_is_forgotten(talk, engine):
    code, out, err = talk("x" * 500, "short", "/exit", "never read")
    assert code == 0
    assert "maximum context length is" in err
    assert err.endswith("\n/reset forgets the conversation.\n")
    assert engine.text in out
    assert len(engine.requests) == 1
    assert "xxx" not in said(engine)[0]


def test_a_failure_in_the_middle_is_told(talk, engine):
    engine.fail_after = 3
    _, out, err = talk("x")
    assert out.splitlines()[1].startswith("> H")
    assert "the device is gone" in err
    assert "/reset" not in err


EVENT = b'data: {"choices": [{"delta": {"content": "begun"}}]}\n\n'
STREAM = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(EVENT) + EVENT


@pytest.mark.parametrize(
    ("models", "reply", "code"),
    [
        (b'{"data": [{"id": "m"}]}', STREAM + b"\r\n", 0),
        (b'{"data": [{"id": "m"}]}', STREAM + b"\r\n0\r\n\r\n", 0),  # ends well, but too early
        (b'{"data": [{"id": "m"}]}', STREAM[:-9], 0),
        (b'{"data": [{"id": "m"}]}', b"HTTP/1.1 500 x\r\nContent-Length: 9\r\n\r\nshort", 0),
        (b'{"data": [{"id": "m"}]}', b"nonsense\r\n\r\n", 0),
        (b"{}", b"", 1),
        (b"<html>", b"", 1),
    ],
)
def test_an_answer_that_breaks_off_or_is_none_is_told(monkeypatch, capsys, models, reply, code):
    def serve():
        for content in (b"HTTP/1.1 200 OK\r\n\r\n" + models, reply)[: 2 - code]:
            connection, _ = listening.accept()
            with connection:
                sent = b""
                while b"\r\n\r\n" not in sent or (b"POST" in sent and not sent.endswith(b"}")):
                    sent += connection.recv(1 << 16)
                connection.sendall(content)

    monkeypatch.setattr("sys.stdin", io.StringIO("x\n"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        assert chat.main(["--url", url]) == code
        thread.join(10)
    assert "minisgl.chat: no answer from 127.0.0.1" in capsys.readouterr().err


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(server, engine, monkeypatch, capsys):
    partner = chat.RemotePartner(server.url + "/v1/", {})

    class Interrupted:
        def answer(self, messages):
            for index, piece in enumerate(partner.answer(messages)):
                if index == 3 and len(messages) == 1:
                    raise KeyboardInterrupt
                yield piece

    monkeypatch.setattr("sys.stdin", io.StringIO("x\ny\n"))
    chat.converse(Interrupted(), None)
    out = capsys.readouterr().out
    text = out[len("> ") : out.index(" ...\n")]
    assert text
    assert engine.text.startswith(text)
    assert engine.text != text
    assert text in said(engine)[1]


class Reasons(BaseHTTPRequestHandler):
    """A server whose model reasons, and whose stream has null where there is nothing."""

    def do_GET(self):
        self.answer(json.dumps({"data": [{"id": "m"}]}))

    def do_POST(self):
        deltas = (
            {"role": "assistant"},
            {"reasoning_content": "hm"},
            {"content": None},
            {"content": "a"},
        )
        chunks = [json.dumps({"choices": [{"delta": delta}]}) for delta in deltas]
        self.answer("".join(f"data: {chunk}\n\n" for chunk in [*chunks, "[DONE]"]))

    def answer(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("is_terminal", [True, False])
def test_reasoning_is_dimmed_in_a_terminal_and_no_part_of_the_conversation(
    tmp_path, monkeypatch, capsys, is_terminal
):
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"x\n/save {tmp_path}/kept\n"))
    with HTTPServer(("127.0.0.1", 0), Reasons) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert chat.main(["--url", f"http://127.0.0.1:{server.server_port}"]) == 0
        server.shutdown()
    out = capsys.readouterr().out.split("\n", 1)[1]
    assert out == ("> \x1b[2mhm\x1b[0m\n\na\n> > \n" if is_terminal else "> a\n> > \n")
    assert json.loads((tmp_path / "kept").read_text())[1]["content"] == "a"


def test_an_engine_in_this_process_tells_reasoning_apart(tmp_path, monkeypatch):
    template = tmp_path / "template"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}<think>\n")

    class Engine:
        tokenizer = Tokenizer.from_directory(BUNDLED_MODEL, str(template))

        def __init__(self, **_):
            pass

        def stream(self, *_):
            yield from ("wh", "at</th", "ink>\n\nye", "s <think>")

    monkeypatch.setattr("minisgl.llm.LLM", Engine)
    pieces = [*chat.LocalPartner(EngineConfig(), {}).answer([{"role": "user", "content": "x"}])]
    assert "".join(text for text, is_reasoning in pieces if is_reasoning) == "what"
    assert "".join(text for text, is_reasoning in pieces if not is_reasoning) == "yes <think>"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--url", "nonsense"], "--url must be like"),
        (["--url", "http://127.0.0.1:9"], "no answer from 127.0.0.1:9"),
        (["--url", "http://127.0.0.1:x"], "no answer from 127.0.0.1:x: nonnumeric port"),
    ],
)
def test_a_wrong_url_is_said(capsys, flags, words):
    assert chat.main(flags) == 1
    assert words in capsys.readouterr().err


def test_engine_flags_do_not_go_with_a_url(capsys):
    with pytest.raises(SystemExit):
        chat.main(["--url", "http://x", "--page-size", "32"])
    assert "--url cannot be combined with flags of the engine" in capsys.readouterr().err


@pytest.fixture
def typed(server, monkeypatch, capsys):
    """Runs a chat whose user types these lines; None is a Ctrl-C at the prompt."""

    def run(*lines):
        left = list(lines)

        def read(prompt):
            if not left:
                raise EOFError
            if (line := left.pop(0)) is None:
                raise KeyboardInterrupt
            return line

        monkeypatch.setattr("builtins.input", read)
        assert chat.main(["--url", server.url]) == 0
        return capsys.readouterr(), left

    return run


def test_the_second_ctrl_c_at_a_prompt_ends_and_says_what_is_kept(typed):
    (out, _), unread = typed("eins", None, None, "never read")
    not_kept = "The conversation is not kept; /save FILE keeps it."
    assert out.splitlines()[-3:] == [f"Ctrl-C again ends. {not_kept}", "", not_kept]
    assert unread == ["never read"]


def test_a_ctrl_c_at_a_prompt_is_forgotten_once_something_is_said(typed, engine):
    _, unread = typed(None, "eins", None, "zwei")
    assert unread == []
    assert len(engine.requests) == 2


def test_a_conversation_is_kept_in_a_file_from_then_on(typed, engine, tmp_path):
    file, other = tmp_path / "kept.json", tmp_path / "missing" / "kept.json"
    (out, err), _ = typed("eins", f"/save {file}", "zwei", None, "/reset", "drei", None, None)
    kept = json.loads(file.read_text())
    assert [message["content"] for message in kept[::2]] == ["eins", "zwei"]
    assert [message["content"] for message in kept[1::2]] == [engine.text] * 2
    assert f"The conversation is kept in {file}." in out
    assert out.endswith("The conversation is not kept; /save FILE keeps it.\n")
    assert err == ""
    (out, err), _ = typed("eins", f"/save {other}", None, None)
    assert "minisgl.chat: the conversation is not kept: " in err
    assert str(other) in err
