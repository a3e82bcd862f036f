"""Parts of text -> objects of the chat and completions APIs: whole, or the chunks of a stream."""

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from minisgl import __version__
from minisgl.core.request import FinishReason
from minisgl.server.answer import AnswerParser
from minisgl.server.calls import Call
from minisgl.server.echo import Offsets
from minisgl.server.generate import Part, Scored, Usage
from minisgl.server.reading import News
from minisgl.server.tokenizer import Tokenizer
from minisgl.server.tools import new_call

LOWEST_LOGPROB = -9999.0  # OpenAI's for a probability of zero; JSON has no infinity

Json = dict[str, Any]


class ChatShape:
    """How the chat API writes its choices."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, call: Call, tokenizer: Tokenizer) -> None:
        self._with_logprobs = call.params.logprobs is not None
        self._tokenizer = tokenizer
        self._form = call.form
        self._parsers: dict[int, AnswerParser] = {}  # of streamed choices

    def whole(
        self, choice: int, text: str, scored: list[Scored], finish_reason: FinishReason | None
    ) -> Json:
        """A choice of a whole answer."""
        parser = AnswerParser(self._form)
        said: dict[str, str] = {"text": "", "reasoning": ""}
        calls: list[Json] = []
        for news in (*parser.push(text), *parser.end()):
            if news.kind == "name":
                calls.append(new_call(self._form.tools, news.text))
            elif news.kind == "arguments":
                calls[-1]["function"]["arguments"] += news.text
            else:
                said[news.kind] += news.text
        is_other = bool(calls or said["reasoning"])
        message = {"role": "assistant", "content": said["text"] or (None if is_other else "")}
        message |= {"refusal": None}
        message |= {"reasoning_content": said["reasoning"]} if said["reasoning"] else {}
        return {
            "index": choice,
            "message": message | ({"tool_calls": calls} if calls else {}),
            "logprobs": self._logprobs(scored),
            "finish_reason": self._finish_reason(finish_reason, parser),
        }

    def chunks(self, part: Part) -> Iterator[Json]:
        """A part as choices of chunks: none while it shows nothing."""
        choice, ended = part.choice, part.finish_reason
        if part.is_first:
            self._parsers[choice] = AnswerParser(self._form)
            content = "" if self._form.tools is None else None
            yield self._chunk(choice, {"role": "assistant", "content": content, "refusal": None})
        parser = self._parsers[choice]
        deltas = [*map(self._delta, (*parser.push(part.text), *(parser.end() if ended else ())))]
        for index, delta in enumerate(deltas or [{"content": ""}] * bool(part.scored)):
            yield self._chunk(choice, delta, None if index else self._logprobs(part.scored))
        if ended is not None:
            yield self._chunk(choice, {}, None, self._finish_reason(ended, parser))

    def _delta(self, news: News) -> Json:
        if news.kind == "name":
            call = {"index": news.call} | new_call(self._form.tools, news.text)
            return {"tool_calls": [call]}
        if news.kind == "arguments":
            return {"tool_calls": [{"index": news.call, "function": {"arguments": news.text}}]}
        return {"content" if news.kind == "text" else "reasoning_content": news.text}

    def _finish_reason(self, ended: FinishReason | None, parser: AnswerParser) -> str | None:
        """A call that broke off is none to be answered, whatever else there is."""
        return self._form.finish_reason if ended == "stop" and parser.has_calls else ended

    def _chunk(
        self,
        choice: int,
        delta: Json,
        logprobs: Json | None = None,
        finish_reason: str | None = None,
    ) -> Json:
        return {
            "index": choice,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }

    def _logprobs(self, scored: list[Scored]) -> Json | None:
        if not self._with_logprobs:
            return None
        return {"content": scored_json(scored, self._tokenizer), "refusal": None}


def scored_json(scored: list[Scored], tokenizer: Tokenizer) -> list[msgspec.Raw]:
    """Tokens with their log-probabilities and those of the likeliest."""

    def token(token_id: int, logprob: float) -> Json:
        spelled = tokenizer.token_bytes(token_id)
        return {
            "token": spelled.decode("utf-8", errors="replace"),
            "logprob": max(logprob, LOWEST_LOGPROB),
            "bytes": list(spelled),
        }

    content = []
    for _, entry in scored:
        if entry is not None:
            top = zip(entry.top_ids, entry.top_logprobs, strict=True)
            likeliest = {"top_logprobs": [token(*pair) for pair in top]}
            content.append(written(token(entry.token_id, entry.logprob) | likeliest))
    return content


class CompletionShape:
    """How the completions API writes its choices."""

    whole_object = chunk_object = "text_completion"

    def __init__(self, call: Call, tokenizer: Tokenizer) -> None:
        self._with_logprobs = call.params.logprobs is not None
        self._tokenizer = tokenizer
        self._call = call
        self._offsets: dict[int, Offsets] = {}

    def whole(
        self, choice: int, text: str, scored: list[Scored], finish_reason: FinishReason | None
    ) -> Json:
        return {
            "index": choice,
            "text": text,
            "logprobs": self._logprobs(choice, scored),
            "finish_reason": finish_reason,
        }

    def chunks(self, part: Part) -> Iterator[Json]:
        if part.text or part.scored or part.finish_reason is not None:
            yield self.whole(part.choice, part.text, part.scored, part.finish_reason)

    def _logprobs(self, choice: int, scored: list[Scored]) -> Json | None:
        """The old shape: parallel lists; `text_offset` counts characters of this choice's text."""
        if not self._with_logprobs:
            return None
        echo = self._call.echo[choice // self._call.params.n] if self._call.echo else None
        offsets = self._offsets.setdefault(choice, Offsets(self._tokenizer, echo))
        entries = [entry for _, entry in scored]
        return {
            "tokens": [self._spelled(token_id) for token_id, _ in scored],
            "token_logprobs": [e and max(e.logprob, LOWEST_LOGPROB) for e in entries],
            "top_logprobs": [
                e
                and written(
                    {
                        self._spelled(token_id): max(logprob, LOWEST_LOGPROB)
                        for token_id, logprob in (
                            *zip(e.top_ids, e.top_logprobs, strict=True),
                            (e.token_id, e.logprob),
                        )
                    }
                )
                for e in entries
            ],
            "text_offset": [offsets.advance(token_id) for token_id, _ in scored],
        }

    def _spelled(self, token_id: int) -> str:
        """The token as text, or as OpenAI writes a part of a character: `bytes:\\xe2\\x82`."""
        spelled = self._tokenizer.token_bytes(token_id)
        try:
            return spelled.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


class Reply:
    """Writes the answer to one call."""

    def __init__(self, call: Call, tokenizer: Tokenizer) -> None:
        shape = ChatShape if call.kind == "chat" else CompletionShape
        self._shape = shape(call, tokenizer)
        self._call = call
        self._told: set[int] = set()  # choices whose stream has had the warnings

    def choice(self, parts: list[Part]) -> msgspec.Raw:
        """All parts of one choice as JSON, in an answer that is not streamed."""
        scored = [entry for part in parts for entry in part.scored]
        text, last = "".join(part.text for part in parts), parts[-1]
        return written(self._shape.whole(last.choice, text, scored, last.finish_reason))

    def whole(self, choices: Iterable[msgspec.Raw], usage: Usage) -> Json:
        """The body of an answer that is not streamed, of its choices in order."""
        whole = self._object(self._shape.whole_object, [*choices]) | {"usage": usage_json(usage)}
        return whole | self._warnings

    def events(self, part: Part, usage: Usage) -> bytes:
        """The chunks of a stream that a part gives; `usage` is the call's up to here."""
        return b"".join(map(_framed, self._chunks(part, usage)))

    def end(self, usage: Usage) -> bytes:
        """The end of a stream, behind a chunk with the usage where it was asked for."""
        last = b""
        if self._call.stream_options.include_usage:
            chunk = self._object(self._shape.chunk_object, [])
            last = _framed(chunk | {"usage": usage_json(usage)})
        return last + b"data: [DONE]\n\n"

    def failure(self, body: Json) -> bytes:
        """The last event of a stream that fails, by the body of the error."""
        return _framed(body)

    def _chunks(self, part: Part, usage: Usage) -> Iterator[Json]:
        for choice in self._shape.chunks(part):
            chunk = self._object(self._shape.chunk_object, [choice])
            if self._call.stream_options.continuous_usage_stats:
                chunk["usage"] = usage_json(usage)
            elif self._call.stream_options.include_usage:
                chunk["usage"] = None
            yield chunk | ({} if part.choice in self._told else self._warnings)
            self._told.add(part.choice)

    @property
    def _warnings(self) -> Json:
        return {"minisgl_warnings": self._call.warnings} if self._call.warnings else {}

    def _object(self, name: str, choices: list[Json] | list[msgspec.Raw]) -> Json:
        return {
            "id": self._call.id,
            "object": name,
            "created": self._call.created,
            "model": self._call.model,
            "system_fingerprint": f"minisgl-{__version__}",
            "choices": choices,
        }


def _framed(content: Json) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def written(value: object) -> msgspec.Raw:
    """As JSON already: a tenth of the memory, where there are many."""
    return msgspec.Raw(msgspec.json.encode(value))


def usage_json(usage: Usage) -> Json:
    made = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.accepted_drafts or usage.rejected_drafts:
        made["completion_tokens_details"] = {
            "accepted_prediction_tokens": usage.accepted_drafts,
            "rejected_prediction_tokens": usage.rejected_drafts,
        }
    return made
