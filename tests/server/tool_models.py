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

HERMES = """{%- if tools %}<|im_start|>system
<tools>{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}</tools><|im_end|>
{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if thinking %}<think>
{% elif thinking is false %}<think>

</think>

{% endif %}{% endif %}"""  # noqa: E501

# As Mistral's: an id has nine characters, a text beside calls is left out.
MISTRAL = """{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in messages %}
{%- if m.tool_calls is defined %}[TOOL_CALLS]{{ m.tool_calls | tojson }}
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('an id has 9 characters') }}{% endif %}
{{- '[TOOL_RESULTS]' + m.content + m.tool_call_id }}
{%- else %}[INST]{{ m.content }}[/INST]{% endif %}{% endfor %}"""

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
