"""instructor: objects by its modes, whole and as they grow."""

import contextlib

import instructor
import openai
import pydantic
import pytest
from instructor import Mode
from instructor.core import IncompleteOutputException

from tests.clients.weather import MESSAGES, Weather

LIMITS = dict.fromkeys((Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA, Mode.JSON), "max_tokens")
LIMITS[Mode.RESPONSES_TOOLS] = "max_output_tokens"


class Anything(pydantic.BaseModel):
    """Any object: what a mode can give that asks for JSON without a schema."""

    model_config = pydantic.ConfigDict(extra="allow")


def make(url, mode, response_model, *, grows=False, **options):
    with openai.OpenAI(base_url=url, api_key="x", max_retries=0) as raw:
        chat = instructor.from_openai(raw, mode=mode).chat.completions
        create = chat.create_partial if grows else chat.create
        asked = {"model": "tiny", "messages": MESSAGES, LIMITS[mode]: 400, "max_retries": 0}
        made = create(response_model=response_model, **asked | options)
        return [*made] if grows else made


@pytest.mark.parametrize("mode", [mode for mode in LIMITS if mode is not Mode.JSON], ids=str)
def test_an_object_comes_whole_and_as_it_grows(url, mode):
    assert isinstance(make(url, mode, Weather), Weather)
    *_, last = make(url, mode, Weather, grows=True)
    assert Weather.model_validate(last.model_dump())


def test_json_without_a_schema_is_some_object(url):
    """Or cut, for nothing bounds it, which is told."""
    for seed in range(10):
        with contextlib.suppress(IncompleteOutputException):
            assert isinstance(make(url, Mode.JSON, Anything, seed=seed), Anything)
            return
    pytest.fail("every answer was cut")


def test_a_call_behind_a_text_is_an_object(scripted_url):
    class weather(pydantic.BaseModel):
        place: str

    with openai.OpenAI(base_url=scripted_url, api_key="x", max_retries=0) as raw:
        client = instructor.from_openai(raw, mode=Mode.TOOLS)
        asked = {"model": "test-model", "messages": MESSAGES, "max_retries": 0}
        made = client.chat.completions.create(response_model=weather, **asked)
    assert made.place == "Köln {"
