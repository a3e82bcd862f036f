"""`python -m minisgl.chat` against a server, fed through its standard input."""

import io

import pytest

from minisgl import chat


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


def test_flags_reach_the_server(talk, engine):
    talk("x", flags=["--temperature", "0", "--max-tokens", "3"])
    params = engine.requests[0].params
    assert (params.temperature, params.max_tokens) == (0.0, 3)


def test_what_could_not_be_answered_is_forgotten(talk, engine):
    code, out, err = talk("x" * 500, "short", "/exit", "never read")
    assert code == 0
    assert "the context holds" in err
    assert engine.text in out
    assert len(engine.requests) == 1
    assert "xxx" not in said(engine)[0]


def test_a_failure_in_the_middle_is_told(talk, engine):
    engine.fail_after = 3
    _, out, err = talk("x")
    assert out.splitlines()[1].startswith("> H")
    assert "the device is gone" in err


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(server, engine, capsys):
    partner = chat.RemotePartner(chat.Options(url=server.url + "/v1/"))

    class Interrupted:
        def answer(self, messages):
            for index, piece in enumerate(partner.answer(messages)):
                if index == 3:
                    raise KeyboardInterrupt
                yield piece

    text = chat._show(Interrupted(), [{"role": "user", "content": "x"}])
    assert text
    assert engine.text.startswith(text)
    assert capsys.readouterr().out.endswith(" ...\n")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--url", "nonsense"], "--url must be like"),
        (["--url", "http://127.0.0.1:9"], "no answer from 127.0.0.1:9"),
    ],
)
def test_a_wrong_url_is_said(capsys, flags, words):
    assert chat.main(flags) == 1
    assert words in capsys.readouterr().err


def test_engine_flags_do_not_go_with_a_url(capsys):
    with pytest.raises(SystemExit):
        chat.main(["--url", "http://x", "--page-size", "32"])
    assert "--url talks to a server" in capsys.readouterr().err
