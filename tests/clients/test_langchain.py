"""langchain-openai: tools, structured output and streams, by the chat and the Responses API."""

import pytest
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from tests.clients.weather import Weather

APIS = {
    "chat": {"stream_usage": True},
    "responses": {"use_responses_api": True},
    "responses/v1": {"use_responses_api": True, "output_version": "responses/v1"},
    "v1": {"use_responses_api": True, "output_version": "v1"},
}


@tool(args_schema=Weather)
def weather(place: str, days: int, kind: str) -> str:
    """How it is outside."""
    return f"{kind} in {place} for {days} days"


@pytest.fixture(params=APIS.values(), ids=APIS)
def options(request):
    return request.param | {"api_key": "x", "max_retries": 0}


@pytest.fixture
def llm(url, options):
    return ChatOpenAI(model="tiny", base_url=url, max_tokens=400, temperature=0, **options)


@pytest.fixture
def scripted(scripted_url, options):
    return ChatOpenAI(model="test-model", base_url=scripted_url, **options)


def streamed(llm, asked):
    """A streamed message, put together by the client."""
    first, *more = llm.stream(asked)
    for chunk in more:
        first += chunk
    return first


def test_a_stream_is_the_whole(llm):
    whole, put_together = llm.invoke("Hello"), streamed(llm, "Hello")
    assert whole.text == put_together.text != ""
    for key in ("input_tokens", "output_tokens", "total_tokens"):
        assert whole.usage_metadata[key] == put_together.usage_metadata[key] > 0


@pytest.mark.parametrize("choice", ["any", "weather"])
@pytest.mark.parametrize("strict", [None, True])
def test_bound_tools_are_called_by_their_schema(llm, choice, strict):
    bound = llm.bind_tools([weather], tool_choice=choice, strict=strict, parallel_tool_calls=False)
    for message in (bound.invoke("Weather?"), streamed(bound, "Weather?")):
        (call,) = message.tool_calls
        assert call["name"] == "weather"
        assert Weather.model_validate(call["args"])


@pytest.mark.parametrize("put_together", [False, True])
def test_a_loop_of_calls_ends_in_text(llm, put_together):
    bound = llm.bind_tools([weather], tool_choice="any", parallel_tool_calls=False)
    said = [SystemMessage("Be kind."), HumanMessage("Weather?")]
    for _ in range(2):
        answer = streamed(bound, said) if put_together else bound.invoke(said)
        (call,) = answer.tool_calls
        said += [answer, ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])]
    assert llm.invoke(said).usage_metadata["input_token_details"]["cache_read"] > 0


@pytest.mark.parametrize("strict", [None, True])
@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_structured_output_is_an_object(llm, method, strict):
    structured = llm.with_structured_output(Weather, method=method, strict=strict)
    assert isinstance(structured.invoke("Weather?"), Weather)
    *_, last = structured.stream("Weather?")
    assert isinstance(last, Weather)


@pytest.mark.parametrize("put_together", [False, True])
def test_reasoning_text_and_calls_go_there_and_back(scripted, put_together):
    bound = scripted.bind_tools([weather])
    said = [SystemMessage("Be kind."), HumanMessage("Weather?")]
    for _ in range(2):
        answer = streamed(bound, said) if put_together else bound.invoke(said)
        assert answer.text == "Let me see."
        (call,) = answer.tool_calls
        assert call["args"] == {"place": "Köln {"}
        said += [answer, ToolMessage("wet", tool_call_id=call["id"])]


def test_what_is_not_served_is_refused_by_name(llm):
    effort = {"reasoning": {"effort": "low"}} if llm.use_responses_api else None
    with pytest.raises(Exception, match=r"reasoning(\.|_)effort is not supported, got .low"):
        llm.invoke("Hello", **effort or {"reasoning_effort": "low"})
