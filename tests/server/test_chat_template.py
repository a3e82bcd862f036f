"""Chat templates render what transformers renders, and refuse what its sandbox refuses."""

import pytest

from minisgl.server.chat_template import ChatTemplate

CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

# Alternation checked with raise_exception, as Mistral and Gemma do.
ALTERNATING = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
  {%- set system = messages[0]['content'] + '\\n\\n' %}
  {%- set rest = messages[1:] %}
{%- else %}
  {%- set system = '' %}
  {%- set rest = messages %}
{%- endif %}
{%- for message in rest %}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
    {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
  {%- endif %}
  {%- if message['role'] == 'user' %}
    {{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' }}
  {%- else %}
    {{- ' ' + message['content'] + eos_token }}
  {%- endif %}
{%- endfor %}
"""

# Namespaces, backward search, tools as JSON, as Qwen3 does.
TOOLS = """
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.reasoning_content is defined and loop.index0 > ns.last %}
        {{- '<think>' + message.reasoning_content.strip('\\n') + '</think>' }}
    {%- endif %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>' }}{{ call.function.arguments | tojson(indent=2) }}
        {%- endfor %}
    {%- endif %}
    {{- message.role }}: {{ message.content }}|{{ ns.last }}
{% endfor %}
"""

# Macros with defaults and recursion, dictsort, documents, as Gemma's and Command R's do.
MACROS = """
{%- macro show(value, depth=0) -%}
  {%- if value is mapping -%}
    {%- for key, item in value | dictsort -%}
      {{ '  ' * depth }}{{ key }}={{ show(item, depth + 1) }};
    {%- endfor -%}
  {%- elif value is iterable and value is not string -%}
    [{% for item in value %}{{ show(item) }}{{ ", " if not loop.last }}{% endfor %}]
  {%- else -%}
    {{ value }}
  {%- endif -%}
{%- endmacro -%}
{% for tool in tools or [] %}{{ show(tool) }}{% endfor %}
{% for document in documents or [] %}
    Document: {{ loop.index }}
    {{ document.title | upper }}: {{ document.text | indent(4) }}
{% endfor %}
{{ messages | map(attribute='content') | join(' / ') }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}
"""

# Loop controls and generation blocks, whose assignments stay inside.
BLOCKS = """{% set mark = 'outer' %}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% if message.role == 'assistant' %}
        {% generation %}
        {% set mark = 'inner' %}
    {{ message.content }}{{ mark }}{{ loop.index }}
        {% endgeneration %}
    {% else %}
  {{ message.content }}
    {% endif %}
    {% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}
{{ mark }}"""

JSON = """{{ messages[:2] | tojson }}
{{ tools | tojson(indent=4) }}
{{ tools | tojson(separators=(',', ':')) }}
{{ messages[:2] | tojson(ensure_ascii=True, sort_keys=True) }}
{{ '<b>&"' | tojson }}"""

BUILDERS = """{% set a = dict(x=1, y='ü') %}{% set b = dict.fromkeys(['p', 'q'], 0) %}
{{ a.x }}{{ a['y'] }}{{ b | tojson }}
{% set ns = namespace(a, self=2) %}{% set ns.z = 3 %}{{ ns.x + ns.self + ns.z }}
{{ undefined_name }}{{ messages[0].nothing }}|{{ messages[9] is defined }}"""

DATE = "{{ strftime_now('%Y') | length }}{{ strftime_now('%d %b') | length }}"

EVERY_TEXT = "{{ messages | map(attribute='content') | join }}"  # a text left out is refused

TEMPLATES = {
    "chatml": CHATML,
    "alternating": ALTERNATING,
    "tools": TOOLS,
    "macros": MACROS,
    "blocks": BLOCKS + EVERY_TEXT,
    "json": JSON + EVERY_TEXT,
    "builders": BUILDERS + EVERY_TEXT,
    "date": DATE + EVERY_TEXT,
}

TOOL = {
    "type": "function",
    "function": {
        "name": "wetter",
        "description": "Das <Wetter> & mehr in 東京",
        "parameters": {"type": "object", "properties": {"ort": {"type": "string"}}},
    },
}
SHORT = [{"role": "user", "content": "  Grüße & <b>\n"}]
LONG = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one", "name": None},
    {"role": "assistant", "content": "two\n\n", "reasoning_content": "\nhm\n"},
    {"role": "user", "content": "三"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "call",
        "tool_calls": [{"function": {"name": "wetter", "arguments": {"ort": "東京"}}}],
    },
]
CASES = {
    "short": (SHORT, {}),
    "short, no prompt": (SHORT, {"add_generation_prompt": False}),
    "variable": (SHORT, {"enable_thinking": False}),
    "long": (LONG, {}),
    "tools": (LONG, {"tools": [TOOL, TOOL]}),
    "documents": (SHORT, {"documents": [{"title": "eins", "text": "a\nb"}]}),
}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.fixture(scope="module")
def oracle():
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), **SPECIAL)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_what_transformers_renders(oracle, name, case):
    messages, options = CASES[case]
    options = {"add_generation_prompt": True} | options
    expected = oracle.apply_chat_template(
        messages, chat_template=TEMPLATES[name], tokenize=False, **options
    )
    assert ChatTemplate(TEMPLATES[name], SPECIAL).render(messages, **options) == expected


def test_a_template_may_refuse_with_its_own_words():
    template = ChatTemplate(ALTERNATING, SPECIAL)
    with pytest.raises(ValueError, match="must alternate"):
        template.render([*SHORT, *SHORT])


def test_a_message_of_no_parts_says_nothing():
    concatenating = ChatTemplate("{% for m in messages %}{{ '<' + m.content + '>' }}{% endfor %}")
    for template in (concatenating, ChatTemplate(CHATML)):
        empty, text = ([{"role": "user", "content": content}] for content in ([], ""))
        assert template.render_both(empty) == template.render_both(text)


def test_no_messages_are_refused():
    with pytest.raises(ValueError, match="at least one message"):
        ChatTemplate(CHATML).render([])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ dict.__class__.__base__.__subclasses__() }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ range(10 ** 9) }}",
    ],
)
def test_the_sandbox_holds_and_faults_are_refusals(source):
    with pytest.raises(ValueError, match="refused the messages"):
        ChatTemplate(source).render(SHORT)


def test_messages_are_left_as_they_were():
    message = {"role": "user", "content": "x", "name": None}
    ChatTemplate(CHATML).render([message])
    assert message == {"role": "user", "content": "x", "name": None}
