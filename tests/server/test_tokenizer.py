"""Reading tokenizers and chat templates from HF directories, against transformers' reading."""

import json
import subprocess
import sys

import pytest
import tokenizers

from minisgl.core.request import Delta, SamplingParams
from minisgl.server.text import TextStream
from minisgl.server.tokenizer import Tokenizer
from tests.server import small_tokenizers
from tests.server.small_tokenizers import CHAT_TEMPLATE, save

MESSAGES = [{"role": "user", "content": "größer?"}]


@pytest.fixture(scope="module")
def hf():
    from transformers import PreTrainedTokenizerFast  # seconds to import: only where needed

    return PreTrainedTokenizerFast


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
def test_ids_equal_transformers(tmp_path, hf, kind):
    save(tmp_path, getattr(small_tokenizers, kind)(), bos_token="<s>")
    ours, theirs = Tokenizer.from_directory(tmp_path), hf.from_pretrained(tmp_path)
    for text in [*small_tokenizers.CORPUS[:4], "", " two words <think><|im_end|>x"]:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(
            text, add_special_tokens=False
        )
    chat = theirs.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(MESSAGES) == chat
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.bos_token_id == theirs.bos_token_id


@pytest.mark.parametrize(("flag", "expected"), [(True, 1), (False, 0), (None, 0)])
def test_add_bos_token_in_the_config_decides(tmp_path, flag, expected):
    config = {} if flag is None else {"add_bos_token": flag}
    save(tmp_path, small_tokenizers.byte_level(), bos_token={"content": "<s>"}, **config)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.encode("hi").count(tokenizer.bos_token_id) == expected


def test_add_bos_token_false_beats_the_post_processor(tmp_path):
    save(tmp_path, small_tokenizers.sentence_piece(), bos_token="<s>", add_bos_token=False)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.bos_token_id not in tokenizer.encode("hi")


def test_truncation_and_padding_of_the_file_are_not_applied(tmp_path):
    save(tmp_path, small_tokenizers.byte_level())
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    content["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<s>",
    }
    path.write_text(json.dumps(content))
    text = small_tokenizers.CORPUS[0]
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens_that_only_the_config_declares_are_added(tmp_path):
    backend = small_tokenizers.byte_level()
    size = backend.get_vocab_size()
    save(
        tmp_path,
        backend,
        added_tokens_decoder={
            str(size): {"content": "<|tool|>", "special": True},
            str(size + 1): {"content": "<|shown|>", "special": False},
        },
    )
    tokenizer = Tokenizer.from_directory(tmp_path)
    ids = tokenizer.encode("a<|tool|><|shown|>")
    assert ids[-2:] == [size, size + 1]
    assert tokenizer.decode(ids) == "a<|shown|>"
    assert backend.token_to_id("<|tool|>") is None


STRIPPED = {"lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
EOT = {"__type": "AddedToken", "content": "<|eot|>", **STRIPPED}
SPECIAL_EOT = EOT | {"special": True}
DECODER = {"401": {"content": "<think>", "special": True, **STRIPPED}, "400": {"content": "<|x|>"}}
# Where tokens are named that tokenizer.json has not, or not as special ones: by file.
NAMED_ELSEWHERE = {
    "eos_token": {"tokenizer_config.json": {"eos_token": "<|eot|>"}},
    "eos_token as an object": {"tokenizer_config.json": {"eos_token": EOT}},
    "an ordinary token": {"tokenizer_config.json": {"eos_token": "a", "bos_token": "<|eot|>"}},
    "additional": {"tokenizer_config.json": {"additional_special_tokens": ["<|x|>", SPECIAL_EOT]}},
    "extra": {"tokenizer_config.json": {"extra_special_tokens": ["<|eot|>", "<|x|>"]}},
    "extra by name": {"tokenizer_config.json": {"extra_special_tokens": {"x_token": "<|x|>"}}},
    "a model's own name": {"tokenizer_config.json": {"image_token": "<|x|>", "add_x": True}},
    "added_tokens_decoder": {"tokenizer_config.json": {"added_tokens_decoder": DECODER}},
    "special_tokens_map.json": {
        "tokenizer_config.json": {"eos_token": "<|x|>"},
        "special_tokens_map.json": {
            "eos_token": {"content": "<|eot|>", **STRIPPED},
            "additional_special_tokens": ["<|x|>"],
        },
    },
    "added_tokens.json": {
        "tokenizer_config.json": {"eos_token": "<|eot|>"},
        "added_tokens.json": {"<|eot|>": 343, "<|x|>": 342},
    },
    "files that added_tokens_decoder replaces": {
        "tokenizer_config.json": {"eos_token": "<|x|>", "added_tokens_decoder": DECODER},
        "special_tokens_map.json": {"eos_token": "<|eot|>"},
        "added_tokens.json": {"<|end|>": 402},
    },
}


@pytest.mark.parametrize("kind", ["byte_level", "sentence_piece"])
@pytest.mark.parametrize("case", NAMED_ELSEWHERE)
def test_tokens_named_in_any_file_are_those_of_transformers(tmp_path, case, kind):
    from transformers import AutoTokenizer

    getattr(small_tokenizers, kind)().save(str(tmp_path / "tokenizer.json"))
    for name, content in NAMED_ELSEWHERE[case].items():
        content = {"tokenizer_class": "PreTrainedTokenizerFast"} | content
        if name == "added_tokens.json":
            del content["tokenizer_class"]
        (tmp_path / name).write_text(json.dumps(content))
    ours, theirs = Tokenizer.from_directory(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    text = "to <|eot|>b <|x|> c <think>d<|im_end|> <|end|>"
    ids = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text, add_special_tokens=False) == ids
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.decode(ids).removeprefix(" ") == theirs.decode(ids, skip_special_tokens=True)
    assert ours.special_tokens == theirs.special_tokens_map


def test_null_fields_name_nothing(tmp_path):
    fields = [
        "eos_token",
        "added_tokens_decoder",
        "extra_special_tokens",
        "additional_special_tokens",
    ]
    save(tmp_path, small_tokenizers.byte_level(), **dict.fromkeys(fields))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.eos_token_id is None
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b")) == "ab"


@pytest.mark.parametrize("given", [5, {"special": True}, ["x"], {"content": "x", "lstrip": 1}])
def test_what_is_no_token_is_refused(tmp_path, given):
    save(tmp_path, small_tokenizers.byte_level(), additional_special_tokens=[given])
    with pytest.raises(ValueError, match=r"a token must be a string or an object, got .*"):
        Tokenizer.from_directory(tmp_path)


def test_an_added_token_is_spelled_as_it_is(tmp_path):
    """The tokenizers library reads its letters as coded bytes: "caf\ufffd"."""
    backend = tokenizers.Tokenizer.from_str(small_tokenizers.byte_level().to_str())
    backend.add_tokens(["café", "Ġü"])
    backend.add_special_tokens(["<é>"])
    tokenizer = Tokenizer.from_directory(save(tmp_path, backend))
    text = "a café<é>Ġü naïve ü🚀"
    ids = tokenizer.encode(text)
    assert ids.count(backend.token_to_id("café")) == 1
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    stream = TextStream(tokenizer, SamplingParams())
    pieces = [stream.feed(Delta("r", 0, [token_id])).text for token_id in ids]
    assert "".join(pieces) == tokenizer.decode(ids) == text.replace("<é>", "")


def test_a_token_that_the_vocabulary_has_too_is_of_coded_bytes(tmp_path):
    backend = tokenizers.Tokenizer.from_str(small_tokenizers.byte_level().to_str())
    merged = backend.encode(" größer").ids[0]
    backend.add_tokens([backend.id_to_token(merged)])
    tokenizer = Tokenizer.from_directory(save(tmp_path, backend))
    assert tokenizer.decode([merged]) == " größer"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", "own {{ messages[0].content }}"),
        ("chat_template.json", json.dumps({"chat_template": "own {{ messages[0].content }}"})),
    ],
)
def test_a_template_file_beats_the_config(tmp_path, name, content):
    save(tmp_path, small_tokenizers.byte_level())
    (tmp_path / name).write_text(content)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.decode(tokenizer.encode_chat(MESSAGES)) == "own größer?"


def test_of_several_named_templates_the_default_is_taken(tmp_path):
    templates = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": CHAT_TEMPLATE},
    ]
    save(tmp_path, small_tokenizers.byte_level(), chat_template=templates)
    assert Tokenizer.from_directory(tmp_path).chat_template.source == CHAT_TEMPLATE


def test_a_base_model_has_no_chat(tmp_path):
    save(tmp_path, small_tokenizers.byte_level(), chat_template=None)
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.encode_chat(MESSAGES)


def test_a_wrong_template_is_named_with_its_line(tmp_path):
    save(tmp_path, small_tokenizers.byte_level(), chat_template="a\n{% if %}")
    with pytest.raises(ValueError, match="line 2"):
        Tokenizer.from_directory(tmp_path)


def test_an_unknown_decoder_is_named(tmp_path):
    save(tmp_path, small_tokenizers.byte_level())
    path = tmp_path / "tokenizer.json"
    wordpiece = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder": wordpiece}))
    with pytest.raises(ValueError, match="WordPiece"):
        Tokenizer.from_directory(tmp_path)


def test_a_directory_without_any_tokenizer_names_what_is_missing(tmp_path):
    code = f"""
import sys
sys.modules["transformers"] = None  # as where it is not installed
from minisgl.server.tokenizer import Tokenizer
try:
    Tokenizer.from_directory({str(tmp_path)!r})
except FileNotFoundError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "no tokenizer.json" in done.stdout, done.stderr
    assert "minisgl[hf]" in done.stdout


def test_a_tokenizer_without_tokenizer_json_is_converted_by_transformers(tmp_path):
    """GPT-2's files, vocab.json and merges.txt, as models of the `hf` extra ship them."""
    source = small_tokenizers.byte_level()
    source.model.save(str(tmp_path))
    config = {"tokenizer_class": "GPT2Tokenizer"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = Tokenizer.from_directory(tmp_path)
    for text in small_tokenizers.CORPUS[:4]:
        ids = ours.encode(text)
        assert ids == source.encode(text).ids
        assert ours.decode(ids) == text


@pytest.mark.parametrize("content", ["", "{not json", "[]", '{"version": "1.0"}', "\x00\x01"])
def test_a_malformed_tokenizer_is_refused_by_its_file_name(tmp_path, content):
    save(tmp_path, small_tokenizers.byte_level())
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"/tokenizer\.json is not a tokenizer: ."):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("content", "reason"), [("{", "JSON object: .*truncated"), ("[]", "got `array`")]
)
def test_a_malformed_config_is_refused_by_its_file_name(tmp_path, name, content, reason):
    save(tmp_path, small_tokenizers.byte_level())
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"/{name} .*{reason}"):
        Tokenizer.from_directory(tmp_path)
