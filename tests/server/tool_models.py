"""Served models whose chat templates know tools, and tools for them."""

import dataclasses
import json

import tokenizers

from minisgl.core.executor import Limits
from minisgl.server.answer import REASONING_FORMATS
from minisgl.server.chat import parse_chat
from minisgl.server.chat_template import ChatTemplate
from minisgl.server.tokenizer import Tokenizer
from minisgl.server.tool_formats import TOOL_FORMATS
from tests.server import small_tokenizers
from tests.server.fake_engine import CONFIG, VOCAB, served_model
from tests.server.templates import HERMES

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How it is outside.",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"place": "Köln {"}}\n</tool_call>'
CALLED = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"a": 1}'}}


def model(template=HERMES, tools="hermes", reasoning="think", marks=()):
    backend = tokenizers.Tokenizer.from_str(small_tokenizers.byte_level().to_str())
    backend.add_special_tokens([*marks])
    return dataclasses.replace(
        served_model(),
        tokenizer=Tokenizer(backend, CONFIG, ChatTemplate(template)),
        limits=Limits(
            num_pages=2**14, page_size=1, max_rows=8, max_context=2**14, vocab_size=VOCAB
        ),
        tool_format=TOOL_FORMATS.get(tools),
        reasoning=REASONING_FORMATS.get(reasoning),
    )


def prompt(body, served=None):
    """The prompt that the body becomes."""
    served = served or model()
    call = parse_chat(json.dumps(body).encode(), served)
    return served.tokenizer.decode(call.requests[0].prompt_token_ids, skip_special_tokens=False)
