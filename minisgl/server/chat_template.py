"""Chat templates: messages -> the text a model was trained on, in jinja2's immutable sandbox.

Renders what `transformers.apply_chat_template` renders: the same environment (trimmed blocks, loop
controls, `generation` blocks), filters and globals, without importing transformers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from minisgl.server.fields import TextPart

Message = Mapping[str, Any]
# Of expressions in a template.
_FAULTS = (TypeError, ValueError, LookupError, ArithmeticError, RecursionError)


class ChatTemplate:
    """One compiled template. `special_tokens` (`bos_token`, `eos_token`, ...) are its variables.

    A message's content may be a string or a list of text parts ({"type": "text", "text": ...}).
    Templates read the one, the other or both: each conversation is given to it as strings (parts
    joined by newlines), or as parts where strings would be left out, as marks in their place show.
    Raises ValueError when the source is no valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens or {})
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"chat template, line {error.lineno}: {error.message}") from error

    def render(self, messages: Sequence[Message], /, **options: Any) -> str:
        """The conversation as one string: the first of what `render_both` returns."""
        return self.render_both(messages, **options)[0]

    def render_both(
        self,
        messages: Sequence[Message],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> tuple[str, str]:
        """The conversation as one string, and its frame: the same with a mark in place of each
        text, and with the names of tools, given and called, `marked`.

        `variables` are the template's own (`enable_thinking`).
        Keys of a message whose value is None count as absent, as OpenAI's clients send them.
        Raises ValueError, naming the message, where it is none or its text would be left out, and
        with the template's own words when it refuses the conversation.
        """
        if not messages:
            raise ValueError("messages must hold at least one message, got 0")
        texts = _texts(messages)
        marks = [
            [f"mark-{i}-{j}-" if text.strip() else "" for j, text in enumerate(own)]
            for i, own in enumerate(texts)
        ]
        variables |= {"documents": documents, "add_generation_prompt": add_generation_prompt}
        shown_tools = None if tools is None else [_named(tool) for tool in tools]

        def with_texts(texts: list[list[str]], as_parts: bool) -> str:
            given = [_with_texts(*each, as_parts) for each in zip(messages, texts, strict=True)]
            own = variables | {"tools": tools}
            if texts is marks:
                own["tools"] = shown_tools
                for message in given:
                    if isinstance(calls := message.get("tool_calls"), list):
                        message["tool_calls"] = [_named(call) for call in calls]
            try:
                return self._template.render(self._special_tokens | own, messages=given)
            except (jinja2.TemplateError, *_FAULTS) as error:
                raise ValueError(f"the chat template refused the messages: {error}") from error

        lost: list[int] = []
        for as_parts in (False, True):
            try:
                frame = with_texts(marks, as_parts)
            except ValueError:  # it refuses the conversation, or this form
                continue
            seen = {"", *re.findall(r"mark-\d+-\d+-", shown := frame.lower())}
            missing = [
                i
                for i, own in enumerate(marks)  # a text beside calls is the template's business
                if not (messages[i].get("tool_calls") or seen.issuperset(own))
            ]
            lost = lost or missing
            if not missing and "'type': 'text'" not in shown:  # how Python writes parts
                return with_texts(texts, as_parts), frame
        if not lost:
            return with_texts(texts, False), ""
        role = messages[lost[0]]["role"]
        raise ValueError(f"the chat template leaves out messages[{lost[0]}], of role {role!r}")


def read_template(path: str) -> str:
    """A template's source, of the file that `--chat-template` names. Raises ValueError."""
    try:
        source = Path(path).read_text("utf-8")
        if not source.strip():
            raise ValueError("it is empty")
        ChatTemplate(source)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"chat_template cannot be read from {path}: {reason}") from error
    return source


def marked(name: str) -> str:
    """The name of a tool as a frame has it, where it is no other word's part."""
    return f"named-{name}-"


def _named(tool: Any) -> Any:
    """A tool or a call with its function's name `marked`; what is neither as it is."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        return tool
    own = {**function, "name": marked(str(function["name"]))}
    return {**tool, "function": own} if "function" in tool else own


def _with_texts(message: Message, texts: list[str], as_parts: bool) -> dict[str, Any]:
    """A message with these texts as its content, in one string or in parts."""
    given = {name: value for name, value in message.items() if value is not None}
    if texts:
        parts = [{"type": "text", "text": text} for text in texts]
        given["content"] = parts if as_parts else "\n".join(texts)
    return given


class _Said(msgspec.Struct):
    """What must be right of a message; the rest is the template's business."""

    role: str
    content: str | list[TextPart] | None = None


def _texts(messages: Sequence[Message]) -> list[list[str]]:
    """The texts of each message. Raises ValueError naming what is no message of text."""
    try:
        said = msgspec.convert(messages, list[_Said])
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        raise ValueError(f"messages{place.rstrip('`')}: {reason}") from error
    # No parts are an empty text: templates that know strings alone could not read a list.
    contents = ("" if message.content == [] else message.content or [] for message in said)
    return [[c] if isinstance(c, str) else [part.text for part in c] for c in contents]


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here its body is rendered."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own declaration is a plain set)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _TemplateNamespace(Namespace):
    """`namespace()` without underscore names, which are a way out of the sandbox."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that namespace(self=1) works, as jinja2's
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


class _DictBuilder:
    """`dict(...)` and `dict.fromkeys(...)`, without the attributes of the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _TemplateNamespace
    environment.globals["dict"] = _DictBuilder()
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: jinja2's own filter escapes HTML, which a model must not see."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _check_public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"a chat template's namespace cannot hold names that begin with _, got {name!r}"
        )
