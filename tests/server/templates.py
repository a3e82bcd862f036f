"""Chat templates that know tools, as models of two kinds have them."""

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
