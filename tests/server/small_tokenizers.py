"""Small tokenizers of the two kinds that are served, made on the spot, saved as HF directories."""

import json
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The scheduler gives each running sequence a number of tokens.",
    "Der Fluß fließt über die Brücke, größer und größer.",
    "缓存命中时，前缀不再计算。 スケジューラ 🚀🚀 🙂 naïve café",
    'def f(x):\n    return {"a": [1, 2, 3]}\n\n\n',
] * 4
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def byte_level(vocab_size: int = 340) -> tokenizers.Tokenizer:
    """GPT-2's kind: every byte is a token, characters may be split anywhere."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<think>", "two words"])
    return tokenizer


@cache
def sentence_piece() -> tokenizers.Tokenizer:
    """Llama 2's kind: spaces as a mark, bytes as a fallback, a space before the first word."""
    characters = sorted({c for text in CORPUS[:2] for c in text.replace(" ", "▁")} | {"▁"})
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    merges = [("▁", "t"), ("▁t", "o"), ("e", "n"), ("▁", "s"), ("s", "c"), ("▁", "a")]
    merged = [left + right for left, right in merges]
    vocab = {token: i for i, token in enumerate(["<unk>", *SPECIAL, *byte_tokens])}
    for token in [*characters, *merged]:
        vocab.setdefault(token, len(vocab))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return tokenizer


def save(directory: Path, tokenizer: tokenizers.Tokenizer, **config: object) -> Path:
    """An HF directory with this tokenizer, a chat template and end-of-turn as its EOS."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    defaults = {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(defaults | config))
    return directory
