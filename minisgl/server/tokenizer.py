"""Text -> token ids and token ids -> bytes, from the files of a Hugging Face model directory.

Only `tokenizers` and `jinja2` are needed. transformers is imported for one case: a directory that
ships no tokenizer.json, whose slow tokenizer it can convert.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import tokenizers

from minisgl.server.chat_template import ChatTemplate, Message

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token")
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
        self._special_ids = _add_missing_tokens(backend, config)
        self.special_tokens = _named_tokens(config)
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        self._add_bos: bool | None = config.get("add_bos_token")
        self._to_bytes = _decoder_rule(backend)
        self._bytes_of: dict[int, bytes] = {}

    @classmethod
    def from_directory(cls, directory: str | Path) -> Self:
        """Read tokenizer.json, tokenizer_config.json and the chat template, wherever it is kept.

        Raises FileNotFoundError when there is no tokenizer, ValueError when it is not understood.
        """
        root = Path(directory)
        config = _read_json(root / "special_tokens_map.json") | _read_json(
            root / "tokenizer_config.json"
        )
        path = root / "tokenizer.json"
        if path.is_file():
            backend = _read_tokenizer(path)
        else:
            backend = _convert_with_transformers(root)
        source = _template_source(root, config)
        template = ChatTemplate(source, _named_tokens(config)) if source is not None else None
        return cls(backend, config, template)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's own vocabulary may be padded beyond."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt; with the beginning-of-sequence token where the model wants one."""
        wanted = add_special_tokens and self._add_bos is not False
        ids: list[int] = self._backend.encode(text, add_special_tokens=wanted).ids
        if wanted and self._add_bos and self.bos_token_id is not None:
            ids = ids if ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids]
        return ids

    def encode_chat(self, messages: Sequence[Message], /, **options: Any) -> list[int]:
        """Token ids of a conversation. `options` go to `ChatTemplate.render`.

        Raises ValueError when the model has no chat template or the template refuses.
        """
        if self.chat_template is None:
            raise ValueError("this model has no chat template; use completions instead of chat")
        return self.encode(self.chat_template.render(messages, **options), add_special_tokens=False)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD.

        This is also the text that a `TextStream` gives for the same ids, however they arrive.
        """
        kept = (i for i in ids if not (skip_special_tokens and self.is_special(i)))
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", errors="replace")

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a mark (end of turn, ...) that is no part of the text."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to the text; nothing for an id beyond the tokenizer's vocabulary."""
        known = self._bytes_of.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id)
            known = self._bytes_of[token_id] = b"" if token is None else self._to_bytes(token)
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
    except KeyError:  # an added token is spelled as it is
        return token.encode()


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> frozenset[int]:
    """Tokens that only tokenizer_config.json names are added; the ids of all special ones."""
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    special_texts = set(_named_tokens(config).values())
    declared: dict[str, dict[str, Any]] = config.get("added_tokens_decoder", {})
    for _, fields in sorted(declared.items(), key=lambda item: int(item[0])):
        content, is_special = fields["content"], fields.get("special", False)
        if backend.token_to_id(content) is None:
            backend.add_tokens(
                [
                    tokenizers.AddedToken(
                        content,
                        special=is_special,
                        lstrip=fields.get("lstrip", False),
                        rstrip=fields.get("rstrip", False),
                        single_word=fields.get("single_word", False),
                        normalized=fields.get("normalized", True),
                    )
                ]
            )
        if is_special:
            special_texts.add(content)
    ids = {backend.token_to_id(content) for content in special_texts}
    return frozenset(special | {token_id for token_id in ids if token_id is not None})


def _named_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and its like as plain strings: configs hold strings, objects or null."""
    named: dict[str, str] = {}
    for name in _NAMED_TOKENS:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if content is not None:
            named[name] = content
    return named


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
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no narrower type for what it cannot read
        raise ValueError(f"{path} is not a tokenizer: {error}") from error


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
    backend = getattr(slow, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{missing}, and {type(slow).__name__} has no fast equivalent")
    converted: tokenizers.Tokenizer = backend
    return converted
