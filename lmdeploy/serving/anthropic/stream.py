"""Anthropic's event sequence: message_start, for each block content_block_start / _delta / _stop, then message_delta and message_stop."""

from __future__ import annotations

from typing import Any

from lmdeploy.serving.anthropic import convert
from lmdeploy.serving.anthropic.protocol import MessagesRequest
from lmdeploy.serving.events import TurnEvents, named
from lmdeploy.serving.openai.errors import HttpError, anthropic_error
from lmdeploy.serving.turns import Delta


class MessageEvents(TurnEvents):
    """The events of one message. At most one block is open at a time."""

    def __init__(self, model: str, body: MessagesRequest) -> None:
        self._model, self._body = model, body
        self._index = -1  # of the block that is open, or was last
        self._open: str | int | None = None  # 'text', 'thinking', or which call

    def first(self, delta: Delta) -> bytes:
        """message_start and a ping."""
        usage = {**convert.usage_of(delta.response), "output_tokens": 0}
        return named("message_start", {"message": convert.message(self._model, [], usage)}) + named("ping", {})

    def encode(self, delta: Delta) -> bytes:
        """Thoughts, then text, then calls, each in its block."""
        out = b""
        if delta.reasoning:
            out += self._enter("thinking", {"type": "thinking", "thinking": "", "signature": ""})
            out += self._delta({"type": "thinking_delta", "thinking": delta.reasoning})
        if delta.content:
            out += self._enter("text", {"type": "text", "text": ""})
            out += self._delta({"type": "text_delta", "text": delta.content})
        for piece in delta.tools:
            out += self._enter(piece.place, {"type": "tool_use", "id": piece.id, "name": piece.name, "input": {}})
            if piece.arguments:
                out += self._delta({"type": "input_json_delta", "partial_json": piece.arguments})
        return out if delta.finish_reason is None else out + self._end(delta)

    def failed(self, error: HttpError) -> bytes:
        """One error event; nothing follows it."""
        return named("error", anthropic_error(error))

    def _enter(self, kind: str | int, block: dict[str, Any]) -> bytes:
        """Open a block, unless it is open; close the one before."""
        if self._open == kind:
            return b""
        out = self._leave()
        self._index, self._open = self._index + 1, kind
        return out + named("content_block_start", {"index": self._index, "content_block": block})

    def _leave(self) -> bytes:
        if self._open is None:
            return b""
        out = self._delta({"type": "signature_delta", "signature": convert.SIGNATURE}) if self._open == "thinking" else b""
        self._open = None
        return out + named("content_block_stop", {"index": self._index})

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return named("content_block_delta", {"index": self._index, "delta": delta})

    def _end(self, delta: Delta) -> bytes:
        out = self._enter("text", {"type": "text", "text": ""}) if self._index < 0 else b""
        reason, sequence = convert.stop_of(delta.finish_reason or "", delta.response, self._body)
        ended = {"delta": {"stop_reason": reason, "stop_sequence": sequence}, "usage": convert.usage_of(delta.response)}
        return out + self._leave() + named("message_delta", ended) + named("message_stop", {})
