"""Chats offline: tools and templates that would be ignored are refused; warnings beside a bar."""

import asyncio
import subprocess
import sys

import pytest

from minisgl import LLM, AsyncLLM, SamplingParams
from tests.server.tool_models import HERMES, WEATHER

USER = [{"role": "user", "content": "How is the weather?"}]
SHORT = SamplingParams(max_tokens=2)
TOOLLESS = "{% for m in messages %}{{ m.content }}{% endfor %}"


def files(tmp_path, **texts):
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode("latin-1"))
    return {name: str(tmp_path / name) for name in texts}


def test_a_template_from_a_file_takes_the_place_of_the_models(tmp_path):
    paths = files(tmp_path, plain=TOOLLESS, tools=HERMES)
    with LLM(max_total_tokens=1024, chat_template=paths["plain"]) as llm:
        prompt = llm.chat(USER, SHORT, use_tqdm=False).prompt_token_ids
        assert llm.tokenizer.decode(prompt) == "How is the weather?"
        with pytest.raises(ValueError, match=r"tools\[0\], 'weather', is left out by this model"):
            llm.chat(USER, SHORT, tools=[WEATHER])
        for tool in ("weather", print, {}, {"name": 5}, {"name": ""}, {"function": "f"}):
            with pytest.raises(ValueError, match=r"^tools\[1\] must be an object with a name, got"):
                llm.chat([USER], SHORT, tools=[WEATHER, tool])
        with pytest.raises(TypeError, match=r"^tools must be a list of tools, got 5"):
            llm.chat(USER, SHORT, tools=5)
    with LLM(max_total_tokens=1024, chat_template=paths["tools"]) as llm:
        answer = llm.chat(USER, SHORT, tools=[WEATHER], use_tqdm=False)
        assert "How it is outside." in llm.tokenizer.decode(answer.prompt_token_ids)

    async def ask() -> list[int]:
        async with AsyncLLM(max_total_tokens=1024, chat_template=paths["plain"]) as llm:
            return (await llm.chat(USER, SHORT)).prompt_token_ids

    assert asyncio.run(ask()) == prompt


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("\xe4", "codec can't decode"),
        (" \n", "it is empty"),
        (None, "No such file or directory"),
    ],
)
def test_a_template_that_is_none_is_refused_before_a_model_is_loaded(tmp_path, text, says):
    path = files(tmp_path, x=text)["x"] if text else str(tmp_path / "absent")
    for make in (LLM, AsyncLLM):
        with pytest.raises(
            ValueError, match=f"^chat_template cannot be read from {path}: .*{says}"
        ):
            make("/no/such/model", chat_template=path)
    for module in ("serve", "chat"):
        command = [sys.executable, "-m", f"minisgl.{module}", "--chat-template", path]
        done = subprocess.run([*command, "--model=x"], capture_output=True, text=True, input="")
        assert done.returncode == 1
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"minisgl.{module}: chat_template cannot be read from {path}: ")


def test_a_warning_stands_on_a_line_of_its_own_beside_a_bar():
    """A script that has not configured logging, as most have not."""
    code = """
        from minisgl import LLM, SamplingParams
        form = {"json": {"type": "integer", "not": {}, "maximum": 9}, "strict": False}
        with LLM(max_total_tokens=1024) as llm:
            print(llm.generate("x", SamplingParams(structured_outputs=form)).warnings)
    """
    lines = "\n".join(line[8:] for line in code.splitlines())
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (shown,) = (line for line in done.stderr.replace("\r", "\n").splitlines() if "#/not" in line)
    assert shown.startswith("request offline-0: ")
    assert "prompt" not in shown
