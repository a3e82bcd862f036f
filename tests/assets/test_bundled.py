"""The bundled model and its draft: sizes, shapes, tokenizer, chat template, and that it answers."""

import json
from functools import cache
from pathlib import Path

import jinja2.sandbox
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from tools.train_tiny import corpus, generate, model, trainer

ASSETS = Path(__file__).parents[2] / "minisgl" / "assets"
SHAPES = {"tiny": model.TINY, "tiny-draft": model.TINY_DRAFT}
LIMITS = {"tiny": 8_000_000, "tiny-draft": 1_500_000}  # bytes, all files of the folder
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
CHAT = [
    {"role": "system", "content": "Be concise."},
    {"role": "user", "content": "What is a page?"},
    {"role": "assistant", "content": "A page is  <|im_end|> not."},
    {"role": "user", "content": "Straße 你好 🙂\n{{ x }}"},
]

models = pytest.mark.parametrize("name", SHAPES)


def read(name: str, file: str) -> dict:
    return json.loads((ASSETS / name / file).read_text())


@cache
def tokenizer(name: str = "tiny") -> Tokenizer:
    return Tokenizer.from_file(str(ASSETS / name / "tokenizer.json"))


def rendered(messages: list[dict[str, str]], **options: bool) -> str:
    template = read("tiny", "tokenizer_config.json")["chat_template"]
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, **options)


@models
def test_folder_has_the_layout_and_fits(name: str) -> None:
    files = {path.name: path.stat().st_size for path in (ASSETS / name).iterdir()}
    assert files.keys() - {"MODEL_CARD.md"} == FILES
    assert sum(files.values()) <= LIMITS[name]


@models
def test_config_states_the_trained_shape(name: str) -> None:
    config, shape = read(name, "config.json"), SHAPES[name]
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["tie_word_embeddings"] is True
    assert config["max_position_embeddings"] == 2048
    assert {field: config[field] for field in vars(shape)} == vars(shape)


@models
def test_weights_are_bf16_with_exactly_the_names_of_the_shape(name: str) -> None:
    expected = {k: tuple(v.shape) for k, v in model.Qwen3(SHAPES[name]).state_dict().items()}
    with safe_open(ASSETS / name / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_both_models_read_the_same_tokens() -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (ASSETS / "tiny" / file).read_bytes() == (ASSETS / "tiny-draft" / file).read_bytes()


def test_special_tokens_end_the_generation() -> None:
    eos = read("tiny", "generation_config.json")["eos_token_id"]
    assert eos == [tokenizer().token_to_id(t) for t in (corpus.END, corpus.DOCUMENT_END)]
    assert tokenizer().get_vocab_size() == read("tiny", "config.json")["vocab_size"] == 2048


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_survives_the_tokenizer(text: str) -> None:
    ids = tokenizer().encode(text).ids
    assert tokenizer().decode(ids, skip_special_tokens=False) == text


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**12))
def test_digits_are_tokens_of_their_own(number: int) -> None:
    assert len(tokenizer().encode(str(number)).ids) == len(str(number))


def test_a_name_is_the_same_tokens_in_a_sentence_and_in_json() -> None:
    sentence = tokenizer().encode("I met Bianca today.").tokens
    quoted = tokenizer().encode('{"name": "Bianca"}').tokens
    name = tokenizer().encode("Bianca").tokens
    text = "\n".join(name)
    assert text in "\n".join(sentence)
    assert text in "\n".join(quoted)


def test_chat_template_renders_chatml() -> None:
    messages = [corpus.Message(m["role"], m["content"]) for m in CHAT]
    expected = corpus.chat("any", messages).text + "\n"
    assert rendered(CHAT) == rendered(CHAT, add_generation_prompt=False) == expected
    assert rendered(CHAT, add_generation_prompt=True) == f"{expected}{corpus.START}assistant\n"


@models
def test_transformers_reads_tokenizer_template_and_model_alike(name: str) -> None:
    import transformers  # seconds to import: only where needed

    theirs = transformers.AutoTokenizer.from_pretrained(ASSETS / name)
    assert theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == rendered(
        CHAT, add_generation_prompt=True
    )
    text = rendered(CHAT)
    ids = tokenizer(name).encode(text).ids
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        ASSETS / name, dtype=torch.float32, attn_implementation="eager"
    )
    ours = model.load(ASSETS / name)
    with torch.inference_mode():
        batch = torch.tensor([ids])
        torch.testing.assert_close(ours(batch), reference(batch).logits, atol=1e-3, rtol=0)


def answer(question: str) -> str:
    prompt = rendered([{"role": "user", "content": question}], add_generation_prompt=True)
    tiny = model.load(ASSETS / "tiny")
    with torch.inference_mode():
        (ids,) = generate.generate(
            tiny, [tokenizer().encode(prompt).ids], 64, trainer.eos_ids(tokenizer())
        )
    assert ids[-1] == tokenizer().token_to_id(corpus.END)
    return tokenizer().decode(ids)


def test_it_answers() -> None:
    assert "--port" in answer("Which flag sets the port?")
    assert "pages" in answer("What is paged attention?")
    assert answer("What is 47 + 38?").endswith("47 + 38 = 85.")
    extracted = answer("Extract the name, city and age as JSON: Ana Novak, 41, lives in Porto.")
    assert json.loads(extracted) == {"name": "Ana Novak", "city": "Porto", "age": 41}
