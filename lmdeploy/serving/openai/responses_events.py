"""The event sequence of /v1/responses: created, in_progress, each item with its parts and deltas, then completed, incomplete or failed."""

from __future__ import annotations

from typing import Any

from lmdeploy.serving.events import TurnEvents, named
from lmdeploy.serving.openai import responses_convert as convert
from lmdeploy.serving.openai.convert import new_id
from lmdeploy.serving.openai.errors import HttpError
from lmdeploy.serving.turns import Delta, ToolDelta


class _Open:
    """The item that is being written: its kind ('text', 'reasoning', or which call), its text so far, and what a call is called."""

    def __init__(self, kind: str | int, call: ToolDelta | None = None) -> None:
        self.kind = kind
        self.id = new_id({"text": "msg", "reasoning": "rs"}.get(str(kind), "fc"), "_")
        self.texts: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self.call_id, self.name = (call.id or "", call.name or "") if call else ("", "")

    def item(self, status: str) -> dict[str, Any]:
        """The item as it stands; a new one has no part yet."""
        text = "".join(self.texts)
        if isinstance(self.kind, int):
            return convert.call_item(self.call_id, self.name, text, status, self.id)
        item = convert.message_item(text, status, self.id, self.logprobs) if self.kind == "text" else convert.reasoning_item(text, status, self.id)
        return {**item, "content": []} if status == "in_progress" else item

    def part(self) -> dict[str, Any]:
        """The one part of a message or a thought."""
        text = "".join(self.texts)
        return convert.text_part(text, self.logprobs) if self.kind == "text" else {"type": "reasoning_text", "text": text}


class ResponseEvents(TurnEvents):
    """The events of one response. At most one item is open at a time; every event has its number."""

    def __init__(self, draft: convert.Draft, logprobs: convert.TextLogprobs) -> None:
        self._draft, self._logprobs = draft, logprobs
        self._number = 0
        self._done: list[dict[str, Any]] = []
        self._open: _Open | None = None

    def first(self, delta: Delta) -> bytes:
        """created, in_progress."""
        begun = self._draft.at("in_progress", [])
        return self._event("response.created", response=begun) + self._event("response.in_progress", response=begun)

    def encode(self, delta: Delta) -> bytes:
        """Thoughts, then text, then calls, each in its item."""
        out = self._leave("incomplete") if delta.failed_call else b""
        if delta.reasoning:
            out += self._enter("reasoning") + self._write("response.reasoning_text.delta", delta.reasoning)
        logprobs = self._logprobs.of(delta.content, delta.response, delta.reasoning_tokens)
        if delta.content:
            out += self._enter("text")
            assert self._open is not None
            self._open.logprobs += logprobs
            out += self._write("response.output_text.delta", delta.content, logprobs=logprobs)
        for piece in delta.tools:
            out += self._enter(piece.place, piece)
            if piece.arguments:
                out += self._write("response.function_call_arguments.delta", piece.arguments)
        return out if delta.finish_reason is None else out + self._end(delta.finish_reason, delta)

    def failed(self, error: HttpError) -> bytes:
        """response.failed with what was done so far."""
        reason = {"code": "server_error", "message": error.message}
        return self._event("response.failed", response=self._draft.at("failed", self._done, error=reason))

    def _event(self, event: str, /, **payload: Any) -> bytes:
        self._number += 1
        return named(event, {"sequence_number": self._number - 1, **payload})

    def _enter(self, kind: str | int, call: ToolDelta | None = None) -> bytes:
        """Open an item, unless it is open; close the one before."""
        if self._open is not None and self._open.kind == kind:
            return b""
        out = self._leave("completed")
        self._open = opened = _Open(kind, call)
        out += self._event("response.output_item.added", output_index=len(self._done), item=opened.item("in_progress"))
        return out if isinstance(kind, int) else out + self._event("response.content_part.added", **self._where(), content_index=0, part=opened.part())

    def _where(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open.id, "output_index": len(self._done)}

    def _write(self, name: str, text: str, **extra: Any) -> bytes:
        assert self._open is not None
        self._open.texts.append(text)
        place = {} if isinstance(self._open.kind, int) else {"content_index": 0}
        return self._event(name, **self._where(), **place, delta=text, **extra)

    def _leave(self, status: str) -> bytes:
        """Close the open item."""
        opened = self._open
        if opened is None:
            return b""
        text, where = "".join(opened.texts), self._where()
        if isinstance(opened.kind, int):
            out = self._event("response.function_call_arguments.done", **where, name=opened.name, arguments=text)
        else:
            extra = {"logprobs": opened.logprobs} if opened.kind == "text" else {}
            out = self._event(
                "response.output_text.done" if opened.kind == "text" else "response.reasoning_text.done", **where, content_index=0, text=text, **extra
            )
            out += self._event("response.content_part.done", **where, content_index=0, part=opened.part())
        item = opened.item(status)
        out += self._event("response.output_item.done", output_index=len(self._done), item=item)
        self._done.append(item)
        self._open = None
        return out

    def _end(self, finish_reason: str, delta: Delta) -> bytes:
        out = b"" if self._done or self._open else self._enter("text")
        status = convert.status_of(finish_reason)
        out += self._leave(status)
        ended = self._draft.ended(self._done, finish_reason, delta.response, delta.reasoning_tokens)
        return out + self._event(f"response.{status}", response=ended)
