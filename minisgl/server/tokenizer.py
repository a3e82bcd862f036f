"""Text -> token ids and token ids -> bytes, from the files of a Hugging Face model directory.

Only `tokenizers` and `jinja2` are needed. transformers is imported for one case: a directory that
ships no tokenizer.json, whose slow tokenizer it can convert.
"""

import json
import re
from collections.abc import Callable, Container, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import msgspec
import tokenizers

from minisgl.server.chat_template import ChatTemplate, Message, read_template
from minisgl.server.pieces import PIECE, LongTexts

Check = Callable[[int], None]

_TOKEN_OPTIONS = ("special", "lstrip", "rstrip", "single_word", "normalized")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """A model's tokenizer and chat template. Immutable once loaded, safe to use from threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: dict[str, Any],
        chat_template: ChatTemplate | None = None,
    ) -> None:
        backend.no_truncation()  # a tokenizer.json may carry its training's cut and padding
        backend.no_padding()
        self._backend = backend
        self.chat_template = chat_template
        self.special_tokens = _named_tokens(config)
        self._special_ids = _add_missing_tokens(backend, config, self.special_tokens)
        tokens = backend.get_added_tokens_decoder().items()
        self._added = {token.content: token_id for token_id, token in tokens}
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self._add_bos: bool | None = config.get("add_bos_token")
        self._to_bytes = _decoder_rule(backend)
        # As a SentencePiece decoder does with the space it puts before a text.
        self.strips_first_space = backend.decoder.decode(["▁a"]) == "a"
        self._plain_ids = _plain_ids(backend) if self._to_bytes is _byte_level else frozenset()
        self._bytes_of: dict[int, bytes] = {}

    @classmethod
    def from_directory(cls, directory: str | Path, chat_template: str | None = None) -> Self:
        """Read tokenizer.json, tokenizer_config.json and the chat template, wherever it is kept; or
        what a GGUF file says of the same. A file `chat_template` takes the place of the model's.

        special_tokens_map.json and added_tokens.json count where tokenizer_config.json has no
        `added_tokens_decoder`, which holds all that they do: transformers' rule.
        Raises FileNotFoundError when there is no tokenizer, ValueError when it is not understood.
        """
        root = Path(directory)
        given = None if chat_template is None else read_template(chat_template)
        if root.suffix == ".gguf":
            backend, config = _read_gguf(root)
            own = config.get("chat_template")
            return cls(backend, config, _template(own if given is None else given, config))
        config = _read_json(root / "tokenizer_config.json")
        if "added_tokens_decoder" not in config:
            config |= _read_json(root / "special_tokens_map.json")
            ids = _read_json(root / "added_tokens.json")
            config["added_tokens_decoder"] = {str(ids[text]): text for text in ids}
        path = root / "tokenizer.json"
        backend = _read_tokenizer(path) if path.is_file() else _convert_with_transformers(root)
        own = _template_source(root, config)
        return cls(backend, config, _template(own if given is None else given, config))

    def encode(
        self, text: str, *, add_special_tokens: bool = True, check: Check | None = None
    ) -> list[int]:
        """Token ids of a prompt; with the beginning-of-sequence token where the model wants one.

        `check` may raise where a long text has too many. It is called with numbers of tokens that
        the text has at least, first before any of it is encoded. Other threads run meanwhile.
        """
        wanted = add_special_tokens and self._add_bos is not False
        if len(text) <= PIECE:
            (found,) = self._backend.encode_batch_fast([text], add_special_tokens=wanted)
            ids: list[int] = found.ids
        else:
            ids = self._encode_long(text, wanted, check or (lambda least: None))
        if wanted and self._add_bos and self.bos_token_id is not None:
            ids = ids if ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids]
        return ids

    def offsets(self, text: str, ids: Sequence[int]) -> list[int]:
        """Where each token of `ids`, which `encode` made of `text`, begins in it, in characters.

        Tokens that hold parts of one character all begin where it does.
        """
        # Not `encode`, which lets no other thread run.
        wanted = self._add_bos is not False
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=wanted)
        begins, end = [0] * (len(ids) - len(encoding.ids)), 0
        for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            if start < stop:  # spaces before a word may be left out
                begins.append(min(start, end))
                end = max(end, stop)
            else:  # a token that the text has not, or of nothing but spaces
                begins.append(end)
                end += 0 if self.is_special(token_id) else len(self.token_bytes(token_id))
        return begins

    def _encode_long(self, text: str, add_special_tokens: bool, check: Check) -> list[int]:
        long = self._long_texts
        check(long.fewest_tokens(text))
        ids: list[int] = []
        for piece in long.pieces(text):
            (found,) = self._backend.encode_batch_fast([piece], add_special_tokens=False)
            ids += found.ids
            check(len(ids))
        if not add_special_tokens:
            return ids
        around = self._backend.encode("a")
        is_own = [not mark for mark in around.special_tokens_mask]
        first, last = is_own.index(True), len(is_own) - is_own[::-1].index(True)
        return [*around.ids[:first], *ids, *around.ids[last:]]

    @cached_property
    def _long_texts(self) -> LongTexts:
        return LongTexts(self._backend, self._to_bytes)

    def encode_chat(self, messages: Sequence[Message], /, **options: Any) -> list[int]:
        """Token ids of a conversation, as `render_chat` gives it."""
        return self.encode(self.render_chat(messages, **options), add_special_tokens=False)

    def render_chat(self, messages: Sequence[Message], /, **options: Any) -> str:
        """A conversation as a prompt: the first of what `render_both` returns."""
        return self.render_both(messages, **options)[0]

    def render_both(self, messages: Sequence[Message], /, **options: Any) -> tuple[str, str]:
        """A conversation as a prompt, and its frame. `options` go to `ChatTemplate.render_both`.

        Raises ValueError when the model has no chat template or the template refuses.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template; use completions instead of chat")
        return self.chat_template.render_both(messages, **options)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD.

        This is also the text that a `TextStream` gives for the same ids, however they arrive.
        """
        kept = (i for i in ids if not (skip_special_tokens and self.is_special(i)))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", errors="replace")

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a mark (end of turn, ...) that is no part of the text."""
        return token_id in self._special_ids

    def special_ids(self, texts: Container[str]) -> frozenset[int]:
        """Those of the special tokens that are spelled like one of these."""
        return frozenset(i for i in self._special_ids if self._backend.id_to_token(i) in texts)

    def to_json(self) -> str:
        """As a tokenizer.json that has what the configs add."""
        return self._backend.to_str()

    def added_id(self, text: str) -> int | None:
        """The token of this text that was added to the vocabulary, if there is one."""
        return self._added.get(text)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to the text; nothing for an id beyond the tokenizer's vocabulary."""
        known = self._bytes_of.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id)
            is_plain = token_id in self._plain_ids
            known = b"" if token is None else token.encode() if is_plain else self._to_bytes(token)
            self._bytes_of[token_id] = known
        return known

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


def _decoder_rule(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """How a token of this vocabulary spells bytes, read from the tokenizer's decoder.

    Byte-level vocabularies (GPT-2's alphabet) and SentencePiece-style ones with byte fallback are
    understood. Both work token by token, which is what makes streaming exact. A SentencePiece
    decoder also strips the first space of a text: not done here, since output continues a prompt.
    """
    if backend.decoder is None:
        raise ValueError("tokenizer.json has no decoder: its tokens cannot be turned into text")
    described = json.loads(backend.decoder.__getstate__())
    space_marks: list[tuple[str, str]] = []
    for step in described.get("decoders", [described]):
        match step:
            case {"type": "ByteLevel"}:
                return _byte_level
            case {"type": "Replace", "pattern": {"String": mark}, "content": text}:
                space_marks.append((mark, text))
            case {"type": "Metaspace", "replacement": mark}:
                space_marks.append((mark, " "))
            case {"type": "ByteFallback" | "Fuse" | "Strip"}:
                pass
            case _:
                raise ValueError(f"tokenizer.json has an unknown decoder: {json.dumps(step)}")

    def sentence_piece(token: str) -> bytes:
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        for mark, text in space_marks:
            token = token.replace(mark, text)
        return token.encode()

    return sentence_piece


def _gpt2_alphabet() -> dict[str, int]:
    """Character -> byte: printable Latin-1 stands for itself, other bytes for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_ALPHABET = _gpt2_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[character] for character in token])
    except KeyError:  # spelled as it is
        return token.encode()


def _plain_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    """Added tokens that are spelled as they are where the vocabulary is byte-level.

    Not those that the vocabulary has as well: its merges may make them of coded bytes.
    """
    return frozenset(
        token_id
        for token_id, token in backend.get_added_tokens_decoder().items()
        if token.special or backend.model.token_to_id(token.content) is None
    )


def _add_missing_tokens(
    backend: tokenizers.Tokenizer, config: dict[str, Any], named: dict[str, str]
) -> frozenset[int]:
    """Add the tokens that only the config has, as transformers does; the ids of all special ones.

    Raises ValueError for what is no token.
    """
    further = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    special = [config.get(name, text) for name, text in named.items()]
    special += [] if isinstance(further, dict) else further
    texts = {text for text in (*special, *named.values()) if isinstance(text, str)}
    declared = config.get("added_tokens_decoder") or {}
    backend.add_tokens([_added_token(declared[i], texts) for i in sorted(declared, key=int)])
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    missing = [_added_token(given, texts) for given in special]
    backend.add_tokens([token for token in missing if token.content not in added])
    marked = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    ids = map(backend.token_to_id, named.values())
    return frozenset(marked | {i for i in ids if i is not None})


def _added_token(given: Any, marks: Container[str]) -> tokenizers.AddedToken:
    """A token as a config has it, a string or an object; special where it says so, or by name."""
    fields: Any = {"content": given, "special": given in marks} if isinstance(given, str) else given
    try:
        options = {name: fields[name] for name in _TOKEN_OPTIONS if name in fields}
        token = tokenizers.AddedToken(fields["content"], **options)
    except (TypeError, LookupError) as error:
        raise ValueError(f"a token must be a string or an object, got {given!r}") from error
    token.special = token.special or token.content in marks
    return token


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and its like as plain strings: configs hold strings, objects or null.

    A model's own count too (`image_token`), of which `extra_special_tokens` may be an object.
    """
    extra = config.get("extra_special_tokens")
    given = {**config, **extra} if isinstance(extra, dict) else config
    named: dict[str, str] = {}
    for name, value in given.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            named[name] = content
    return named


def _template(source: str | None, config: dict[str, Any]) -> ChatTemplate | None:
    return None if source is None else ChatTemplate(source, _named_tokens(config))


def _template_source(root: Path, config: dict[str, Any]) -> str | None:
    """The chat template: its own file, else a processor's, else the one in the config."""
    own = root / "chat_template.jinja"
    if own.is_file():
        return own.read_text(encoding="utf-8")
    processor = _read_json(root / "chat_template.json")
    found = processor.get("chat_template", config.get("chat_template"))
    if isinstance(found, list):  # several, by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any]) if path.is_file() else {}
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} must hold a JSON object: {error}") from error


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type for what it cannot read
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


def _read_gguf(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    from minisgl.gguf.header import read_gguf
    from minisgl.gguf.tokenizer import read_tokenizer

    described, config = read_tokenizer(read_gguf(path))
    text = json.dumps(described)
    try:
        return tokenizers.Tokenizer.from_str(text), config
    except Exception as error:  # as above
        raise ValueError(f"{path} holds no valid tokenizer: {error}") from error


def _convert_with_transformers(root: Path) -> tokenizers.Tokenizer:
    missing = f"{root} has no tokenizer.json"
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise FileNotFoundError(
            f"{missing}; `pip install minisgl[hf]` lets transformers convert other tokenizers"
        ) from error
    try:
        slow = AutoTokenizer.from_pretrained(str(root))
    except (OSError, ValueError, ImportError) as error:
        raise FileNotFoundError(
            f"{missing}, and transformers cannot convert it: {error}"
        ) from error
    converted = getattr(slow, "backend_tokenizer", None)
    if not isinstance(converted, tokenizers.Tokenizer):
        raise ValueError(f"{missing}, and {type(slow).__name__} has no fast equivalent")
    return converted
