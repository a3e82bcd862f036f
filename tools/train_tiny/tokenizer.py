"""The tokenizer: byte-level BPE of 2,048 tokens, trained on the corpus.

Three choices help a very small model. Digits stand alone, so a sum is a sum of digits. A capital
letter starts a token of its own (the space before it is not part of it), so a name is the same
tokens in a sentence and in JSON, and extraction is copying. And there is no normaliser, so any text
comes back as it was.
"""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.train_tiny import corpus, mixes

VOCAB_SIZE = 2048
SPECIAL = [corpus.DOCUMENT_END, corpus.START, corpus.END]
# Capitalised word | other word with its space | digit | punctuation with its space | white space.
WORDS = (
    r"\p{Lu}[\p{L}\p{M}]*| ?[\p{Ll}\p{Lt}\p{Lm}\p{Lo}\p{M}][\p{L}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+|[\r\n]+|\s+(?!\S)|\s"
)
# ChatML. Tools stand in a message of their own behind the last request, so that each is read in its
# light: its name in words and its description in small letters, as requests have them, then a call
# with types in place of values, which a call copies. A call is written as Hermes and Qwen do.
CHAT_TEMPLATE = (
    "{%- macro in_words(name) %}{%- for c in name %}"
    "{{- ' ' if c in '_-.' else (' ' + (c | lower) if c is upper else c) }}"
    "{%- endfor %}{%- endmacro %}"
    "{%- macro about(schema) %}"
    "{%- if schema.description %}{{- ' (' + schema.description + ')' }}{%- endif %}"
    "{%- endmacro %}"
    "{%- macro typed(schema) %}"
    "{%- if schema.enum %}{%- for each in schema.enum %}"
    "{{- (' | ' if not loop.first else '') + (each | tojson) }}"
    "{%- endfor %}{{- about(schema) }}"
    "{%- elif schema.type in ('string', 'integer', 'number', 'boolean') %}"
    "{{- schema.type + about(schema) }}"
    "{%- else %}{{- schema | tojson }}{%- endif %}"
    "{%- endmacro %}"
    "{%- macro show_tools() %}"
    "{{- '<|im_start|>tools\\n' }}"
    "{%- for tool in tools %}{%- set function = tool['function'] %}"
    "{{- '- ' + (in_words(function.name) | trim) }}"
    "{%- if function.description %}{{- ': ' + (function.description | lower) }}{%- endif %}"
    '{{- \'\\n{"name": "\' + function.name + \'", "arguments": {\' }}'
    "{%- for key, schema in ((function.parameters or {}).properties or {}).items() %}"
    "{{- (', ' if not loop.first else '') + (key | tojson) + ': ' + typed(schema) }}"
    "{%- endfor %}{{- '}}\\n' }}"
    "{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- endmacro %}"
    "{%- set request = namespace(at=-1) %}"
    "{%- for message in messages %}{%- if message['role'] == 'user' %}"
    "{%- set request.at = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- if tools and request.at < 0 %}{{- show_tools() }}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}"
    "{%- for call in message['tool_calls'] or [] %}"
    "{{- ('\\n' if message['content'] or not loop.first else '') + '<tool_call>\\n{\"name\": \"' }}"
    "{{- call['function']['name'] + '\", \"arguments\": ' }}"
    "{%- set arguments = call['function']['arguments'] %}"
    "{{- (arguments if arguments is string else arguments | tojson) + '}\\n</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- if tools and loop.index0 == request.at %}{{- show_tools() }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def train(seed: int, documents: int = 6000) -> Tokenizer:
    """A tokenizer trained on `documents` seeded samples of the mix."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rng = random.Random(f"tokenizer-{seed}")
    texts = [mixes.sample(rng).text for _ in range(documents)]
    for special in SPECIAL:
        texts = [text.replace(special, "") for text in texts]
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the corpus gave {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}")
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` (with the chat template) into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": corpus.END,
        "pad_token": corpus.DOCUMENT_END,
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
