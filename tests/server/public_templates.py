"""Chat templates in the styles that published models have, each written anew.

Which form of content each reads: "string", "parts" (it goes over a list), or "both".
"""

from typing import Literal, NamedTuple

# ruff: noqa: E501  (a line is broken where the template may break it)


class Style(NamedTuple):
    source: str
    reads: Literal["string", "parts", "both"] = "string"
    system: Literal["read", "refused", "dropped"] = "read"


LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}
{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}
{% for m in rest %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}
{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') }}
{{- m['content'].strip() + ' [/INST]' }}
{%- else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""

LLAMA3 = """{% for m in messages %}
{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim %}
{% if loop.first %}{% set content = bos_token + content %}{% endif %}
{{ content + '<|eot_id|>' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

LLAMA31 = """{{- bos_token }}{%- set date = '26 Jul 2024' %}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}
{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date + '\\n\\n' + system }}
{{- '<|eot_id|>' }}
{%- for m in messages %}
{%- if not (m.role in ('ipython', 'tool') or 'tool_calls' in m) %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- elif m.content is mapping %}{{- m.content | tojson }}{%- else %}{{- m.content }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

LLAMA32_VISION = """{{- bos_token }}
{%- for m in messages %}{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{%- if m.content is string %}{{- m.content }}{%- else %}
{%- for part in m.content %}{%- if part.type == 'image' %}{{- '<|image|>' }}
{%- elif part.type == 'text' %}{{- part.text }}{%- endif %}{%- endfor %}{%- endif %}
{{- '<|eot_id|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

LLAMA4 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
{%- if messages[0]['content'] is string %}{%- set system = messages[0]['content'] | trim %}
{%- else %}{%- set system = messages[0]['content'][0]['text'] | trim %}{%- endif %}
{%- set messages = messages[1:] %}{{- '<|header_start|>system<|header_end|>\\n\\n' + system + '<|eot|>' }}
{%- endif %}
{%- for m in messages %}{{- '<|header_start|>' + m['role'] + '<|header_end|>\\n\\n' }}
{%- if m['content'] is string %}{{- m['content'] }}{%- else %}
{%- for part in m['content'] %}{%- if part['type'] == 'text' %}{{- part['text'] | trim }}{%- endif %}
{%- endfor %}{%- endif %}{{- '<|eot|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|header_start|>assistant<|header_end|>\\n\\n' }}{%- endif %}"""

CHATML = """{% for m in messages %}
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

QWEN2 = """{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

QWEN3 = """{%- set ns = namespace(last=messages | length - 1, looking=true) %}
{%- for m in messages[::-1] %}
{%- if ns.looking and m.role == 'user' and m.content is string
       and not m.content.startswith('<tool_response>') %}
{%- set ns.looking = false %}{%- set ns.last = messages | length - 1 - loop.index0 %}{%- endif %}
{%- endfor %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- if m.role == 'assistant' %}
{%- if '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}{%- endif %}"""

QWEN2_VL = """{% set images = namespace(count=0) %}{% for m in messages %}
<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}<|im_end|>
{% else %}{% for part in m['content'] %}
{% if part['type'] == 'image' or 'image_url' in part %}{% set images.count = images.count + 1 %}
<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}
{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

MISTRAL = """{{ bos_token }}{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}
{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
{% endfor %}"""

MISTRAL_V3 = """{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}
{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}
{{- bos_token }}{%- for m in rest %}{%- if m.role == 'user' %}
{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}
{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}
{%- else %}{{- ' ' + m.content | trim + eos_token }}{%- endif %}{%- endfor %}"""

PIXTRAL = """{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}
{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}
{{- bos_token }}{%- if system is defined %}{{- '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' }}{%- endif %}
{%- for m in rest %}{%- if m.role == 'user' %}{{- '[INST]' }}
{%- if m.content is not string %}{%- for chunk in m.content %}
{%- if chunk.type == 'text' %}{{- chunk.text }}{%- else %}{{- '[IMG]' }}{%- endif %}{%- endfor %}
{%- else %}{{- m.content }}{%- endif %}{{- '[/INST]' }}
{%- else %}{{- m.content + eos_token }}{%- endif %}{%- endfor %}"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
{%- if messages[0]['content'] is string %}{%- set prefix = messages[0]['content'] + '\\n\\n' %}
{%- else %}{%- set prefix = messages[0]['content'][0]['text'] + '\\n\\n' %}{%- endif %}
{%- set rest = messages[1:] %}{%- else %}{%- set prefix = '' %}{%- set rest = messages %}{%- endif %}
{%- for m in rest %}{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}
{%- if m['content'] is string %}{{- m['content'] | trim }}
{%- elif m['content'] is iterable %}{%- for item in m['content'] %}
{%- if item['type'] == 'image' %}{{- '<start_of_image>' }}
{%- elif item['type'] == 'text' %}{{- item['text'] | trim }}{%- endif %}{%- endfor %}
{%- else %}{{- raise_exception('Invalid content type') }}{%- endif %}
{{- '<end_of_turn>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

PHI3 = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}
{{ '<|user|>\\n' + m['content'] + '<|end|>\\n<|assistant|>\\n' }}
{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|end|>\\n' }}{% endif %}{% endfor %}"""

PHI3_SYSTEM = """{% for m in messages %}{% if m['role'] == 'system' and m['content'] %}
{{ '<|system|>\\n' + m['content'] + '<|end|>\\n' }}
{% elif m['role'] == 'user' %}{{ '<|user|>\\n' + m['content'] + '<|end|>\\n' }}
{% elif m['role'] == 'assistant' %}{{ '<|assistant|>\\n' + m['content'] + '<|end|>\\n' }}{% endif %}
{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""

PHI4 = """{% for m in messages %}
{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"""

ZEPHYR = """{% for m in messages %}{% if m['role'] == 'user' %}
{{ '<|user|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}{{ '<|system|>\\n' + m['content'] + eos_token }}
{% elif m['role'] == 'assistant' %}{{ '<|assistant|>\\n' + m['content'] + eos_token }}{% endif %}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}{% endfor %}"""

DEEPSEEK_V2 = """{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}
{{ 'User: ' + m['content'] + '\\n\\n' }}
{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}
{% elif m['role'] == 'system' %}{{ m['content'] + '\\n\\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

DEEPSEEK_R1 = """{% set ns = namespace(system='') %}
{%- for m in messages %}{%- if m['role'] == 'system' %}{% set ns.system = m['content'] %}{%- endif %}
{%- endfor %}{{ bos_token }}{{ ns.system }}
{%- for m in messages %}{%- if m['role'] == 'user' %}{{ '<User>' + m['content'] }}{%- endif %}
{%- if m['role'] == 'assistant' and m['content'] is not none %}{% set content = m['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{%- endif %}
{{ '<Assistant>' + content + eos_token }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{ '<Assistant><think>\\n' }}{%- endif %}"""

COMMAND_R = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}
{% else %}{% set rest = messages %}{% set system = 'You are Command-R.' %}{% endif %}
{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>' + system + '<|END_OF_TURN_TOKEN|>' }}
{% for m in rest %}{% set content = m['content'] %}{% if m['role'] == 'user' %}
{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{% elif m['role'] == 'assistant' %}
{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + content.strip() + '<|END_OF_TURN_TOKEN|>' }}
{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"""

YI = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% endif %}
{% for m in messages %}{% if m['role'] == 'user' %}
{{ '<|im_start|>user\\n' + m['content'] + '<|im_end|>\\n<|im_start|>assistant\\n' }}
{% elif m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"""

OLMO = """{{ eos_token }}{% for m in messages %}
{% if m['role'] == 'system' %}{{ '<|system|>\\n' + m['content'] + '\\n' }}
{% elif m['role'] == 'user' %}{{ '<|user|>\\n' + m['content'] + '\\n' }}
{% elif m['role'] == 'assistant' %}{% if not loop.last %}
{{ '<|assistant|>\\n' + m['content'] + eos_token + '\\n' }}
{% else %}{{ '<|assistant|>\\n' + m['content'] + eos_token }}{% endif %}{% endif %}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""

SMOLLM3 = """{%- set mode = '/no_think' if enable_thinking is defined and not enable_thinking else '/think' %}
{{- '<|im_start|>system\\nReasoning: ' + mode + '\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content.replace('/no_think', '').rstrip() }}
{%- endif %}{{- '<|im_end|>\\n' }}
{%- for m in messages %}{%- set content = m.content if m.content is string else '' %}
{%- if m.role == 'user' %}{{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}{% generation %}
{{- '<|im_start|>assistant\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}{% endgeneration %}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

SMOLVLM = """<|im_start|>{% for m in messages %}{{ m['role'] | capitalize }}
{%- if m['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}
{%- for line in m['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}
{%- elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

LLAVA = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + ' ' }}
{%- for content in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}
{%- for content in m['content'] | selectattr('type', 'equalto', 'text') %}
{{- '\\n' + content['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

INTERN_VL = """{% macro text(content) %}{% for part in content %}
{%- if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endmacro %}
{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + text(m.content) + '<|im_end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

FIRST_PART = """{% for m in messages %}{{ m.role | upper }}: {{ m['content'][0]['text'] }}
{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""

GRANITE = """{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}
{%- set rest = messages[1:] %}{%- else %}{%- set system = 'You are Granite.' %}
{%- set rest = messages %}{%- endif %}
{{- '<|start_of_role|>system<|end_of_role|>' + system + '<|end_of_text|>\\n' }}
{%- for m in rest %}
{{- '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] + '<|end_of_text|>\\n' }}
{%- if loop.last and add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}
{%- endif %}{%- endfor %}"""

FALCON = """{% for m in messages %}{% if not loop.first %}{{ '\\n' }}{% endif %}
{% if m['role'] == 'system' %}{{ 'System: ' + m['content'].strip() }}
{% elif m['role'] == 'user' %}{{ 'User: ' + m['content'].strip() }}
{% else %}{{ 'Falcon: ' + m['content'].strip() }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '\\nFalcon:' }}{% endif %}"""

VICUNA = """{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{{ messages[0]['content'] }}
{% else %}{% set rest = messages %}{{ 'A chat between a user and an assistant.' }}{% endif %}
{% for m in rest %}{% if m['role'] == 'user' %}{{ ' USER: ' + m['content'].strip() }}
{% else %}{{ ' ASSISTANT: ' + m['content'].strip() + eos_token }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"""

ALPACA = """{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\\n\\n' }}
{% elif m.role == 'user' %}{{ '### Instruction:\\n' + m.content + '\\n\\n' }}
{% else %}{{ '### Response:\\n' + m.content + '\\n\\n' }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"""

OPENCHAT = """{{ bos_token }}{% for m in messages %}
{{ 'GPT4 Correct ' + m['role'].title() + ': ' + m['content'] + '<|end_of_turn|>' }}{% endfor %}
{% if add_generation_prompt %}{{ 'GPT4 Correct Assistant:' }}{% endif %}"""

JINJA_JOIN = """{{ messages | map(attribute='content') | join('\\n') }}{{ '\\nAnswer: ' }}"""

STYLES = {
    "llama 2": Style(LLAMA2),
    "llama 3": Style(LLAMA3),
    "llama 3.1": Style(LLAMA31),
    "llama 3.2 vision": Style(LLAMA32_VISION, "both"),
    "llama 4": Style(LLAMA4, "both"),
    "chatml": Style(CHATML),
    "qwen 2": Style(QWEN2),
    "qwen 3": Style(QWEN3),
    "qwen 2 vl": Style(QWEN2_VL, "both"),
    "mistral": Style(MISTRAL, system="refused"),
    "mistral v3": Style(MISTRAL_V3),
    "pixtral": Style(PIXTRAL),
    "gemma": Style(GEMMA, system="refused"),
    "gemma 3": Style(GEMMA3, "both"),
    "phi 3": Style(PHI3, system="dropped"),
    "phi 3 with system": Style(PHI3_SYSTEM),
    "phi 4": Style(PHI4),
    "zephyr": Style(ZEPHYR),
    "deepseek v2": Style(DEEPSEEK_V2),
    "deepseek r1": Style(DEEPSEEK_R1),
    "command r": Style(COMMAND_R),
    "yi": Style(YI),
    "olmo": Style(OLMO),
    "smollm 3": Style(SMOLLM3),
    "smolvlm": Style(SMOLVLM, "parts"),
    "llava": Style(LLAVA, "parts"),
    "internvl": Style(INTERN_VL, "parts"),
    "first part": Style(FIRST_PART, "parts"),
    "granite": Style(GRANITE),
    "falcon": Style(FALCON),
    "vicuna": Style(VICUNA),
    "alpaca": Style(ALPACA),
    "openchat": Style(OPENCHAT),
    "joined": Style(JINJA_JOIN),
}
