"""Parts of text -> the objects of OpenAI's Responses API, and the events of a stream of one.

An answer that is not streamed is what the events of its stream would have built.
"""

import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import msgspec

from minisgl.server.answer import AnswerParser
from minisgl.server.calls import Call
from minisgl.server.generate import Part, Scored, Usage
from minisgl.server.reading import News
from minisgl.server.replies import Json, scored_json, written
from minisgl.server.tokenizer import Tokenizer
from minisgl.server.tools import new_call


class Kind(NamedTuple):
    """How what is new of an answer is told."""

    item: str
    id_prefix: str
    text: str  # the name of the text in events, and of the part that holds it


_CALL = Kind("function_call", "fc", "function_call_arguments")
_KINDS = {
    "text": Kind("message", "msg", "output_text"),
    "reasoning": Kind("reasoning", "rs", "reasoning_text"),
    "name": _CALL,
    "arguments": _CALL,
}
_MORE: dict[str, Json] = {"message": {"role": "assistant"}, "reasoning": {"summary": []}}


class ResponseReply:
    """Writes the answer to one call."""

    def __init__(self, call: Call, tokenizer: Tokenizer) -> None:
        self._call = call
        self._tokenizer = tokenizer
        self._parser = AnswerParser(call.form)
        self._status: Literal["in_progress", "completed", "incomplete", "failed"] = "in_progress"
        self._output: list[Json] = []  # items, the last of which may be open
        self._open: Kind | None = None
        self._texts: list[str] = []  # of the open item
        self._logprobs: list[msgspec.Raw] = []  # of the open item's text
        self._unseen: list[Scored] = []  # tokens whose text has not shown
        self._num_tokens = 0
        self._num_reasoning = 0  # of them; up to the one with the end of its mark
        self._num_events = 0

    def choice(self, parts: list[Part]) -> msgspec.Raw:
        """All output items as JSON, in an answer that is not streamed."""
        for part in parts:
            for _ in self._told(part):
                pass
        return written(self._output)

    def whole(self, choices: Iterable[msgspec.Raw], usage: Usage) -> Json:
        """The body of an answer that is not streamed."""
        (output,) = choices
        return self._response(output, usage)

    def events(self, part: Part, _: Usage) -> bytes:
        """The events of a stream that a part gives."""
        return b"".join(map(_framed, self._told(part)))

    def end(self, usage: Usage) -> bytes:
        """The last event of a stream."""
        response = self._response(self._output, usage)
        return _framed(self._event(f"response.{self._status}", response=response))

    def failure(self, body: Json) -> bytes:
        """The last events of a stream that fails, by the body of the error."""
        ended, error = b"".join(map(_framed, self._close(is_cut=True))), {**body["error"]}
        self._status = "failed"
        code = "server_error" if error.pop("type") == "server_error" else "invalid_prompt"
        failed = self._response(self._output)
        failed["error"] = {"code": code, "message": error["message"]}
        ended += _framed(self._event("error", **error))
        return ended + _framed(self._event("response.failed", response=failed))

    def _told(self, part: Part) -> Iterator[Json]:
        if part.is_first:
            for name in ("response.created", "response.in_progress"):
                yield self._event(name, response=self._response([]))
        for index, text in enumerate(part.texts):
            self._num_tokens += 1
            self._unseen += part.scored[index : index + 1]
            thinks = self._parser.kind == "reasoning"
            said = self._parser.push(text)
            for news in said:
                yield from self._tell(news)
            if text and not self._parser.held:  # it was told, or is of a mark
                self._unseen.clear()
            if thinks or "reasoning" in (self._parser.kind, *(news.kind for news in said)):
                self._num_reasoning = self._num_tokens
        if part.finish_reason is not None:
            for news in self._parser.end():
                yield from self._tell(news)
            is_cut = part.finish_reason == "length"
            yield from self._close(is_cut)
            self._status = "incomplete" if is_cut else "completed"

    def _tell(self, news: News) -> Iterator[Json]:
        kind = _KINDS[news.kind]
        if kind is not self._open or news.kind == "name":
            yield from self._close()
            yield from self._begin(kind, news.text)
        unseen, self._unseen = self._unseen, []
        if news.kind == "name":
            return
        self._texts.append(news.text)
        more: Json = {}
        if news.kind == "text":
            more["logprobs"] = scored_json(unseen, self._tokenizer)
            self._logprobs += more["logprobs"]
        yield self._of_item(f"response.{kind.text}.delta", delta=news.text, **more)

    def _begin(self, kind: Kind, name: str) -> Iterator[Json]:
        """An item; `name` is that of the function, where it is a call."""
        item: Json = {"id": f"{kind.id_prefix}_{uuid.uuid4().hex}", "type": kind.item}
        item["status"] = "in_progress"
        if kind is _CALL:
            call_id = new_call(self._call.form.tools, name)["id"]
            item |= {"call_id": call_id, "name": name, "arguments": ""}
        else:
            item |= {"content": []} | _MORE[kind.item]
        self._open = kind
        self._output.append(item)
        yield self._event("response.output_item.added", **self._place, item=item)
        if kind is not _CALL:
            yield self._of_item("response.content_part.added", part=self._part(kind, ""))

    def _close(self, is_cut: bool = False) -> Iterator[Json]:
        """Ends the open item, if there is one: whole unless it is cut, or a call that broke off."""
        if (kind := self._open) is None:
            return
        item, text, done = self._output[-1], "".join(self._texts), f"response.{kind.text}.done"
        if kind is _CALL:
            is_cut = self._parser.num_ended < sum(i["type"] == kind.item for i in self._output)
            item["arguments"] = text
            yield self._of_item(done, arguments=text)
        else:
            part = self._part(kind, text)
            item["content"] = [part]
            scored = {"logprobs": self._logprobs} if kind.item == "message" else {}
            yield self._of_item(done, text=text, **scored)
            yield self._of_item("response.content_part.done", part=part)
        item["status"] = "incomplete" if is_cut else "completed"
        yield self._event("response.output_item.done", **self._place, item=item)
        self._open, self._texts, self._logprobs = None, [], []

    def _part(self, kind: Kind, text: str) -> Json:
        part: Json = {"type": kind.text, "text": text}
        is_said = kind.item == "message"
        return part | ({"annotations": [], "logprobs": self._logprobs} if is_said else {})

    @property
    def _place(self) -> Json:
        return {"output_index": len(self._output) - 1}

    def _of_item(self, name: str, **fields: object) -> Json:
        """An event of the open item."""
        place = self._place | {"item_id": self._output[-1]["id"]}
        place |= {} if self._open is _CALL else {"content_index": 0}
        return self._event(name, **place, **fields)

    def _event(self, name: str, **fields: object) -> Json:
        self._num_events += 1
        return {"type": name, "sequence_number": self._num_events - 1} | fields

    def _response(self, output: object, usage: Usage | None = None) -> Json:
        is_cut, is_whole = self._status == "incomplete", self._status == "completed"
        response = {
            "id": self._call.id,
            "object": "response",
            "created_at": self._call.created,
            "completed_at": int(time.time()) if is_whole else None,
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "model": self._call.model,
            "output": output,
            "usage": None if usage is None else self._usage_json(usage),
        }
        warnings = {"minisgl_warnings": self._call.warnings} if self._call.warnings else {}
        return response | self._call.repeated | warnings

    def _usage_json(self, usage: Usage) -> Json:
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }


def _framed(event: Json) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), msgspec.json.encode(event))
