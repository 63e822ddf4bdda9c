"""uvicorn's fast HTTP parser with the bound that its slow one has: request line, headers and trailers together are limited.

Bodies are the gate's to limit; what arrives beside a body (chunk sizes and extensions, trailers) is counted here, with room for a body
sent in small chunks.
"""

from __future__ import annotations

from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

#: bytes of one request that are not body, beside a quarter of the body
MAX_HEAD = 1 << 16


class BoundedHttpProtocol(HttpToolsProtocol):
    """Answers 400 and closes the connection when a request's head grows beyond MAX_HEAD."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._received = self._body = 0  # bytes of the request under way

    def data_received(self, data: bytes) -> None:
        """Parse, then see whether what has come without a body is too much. One read of the socket is bounded by itself."""
        self._received += len(data)
        super().data_received(data)
        if self._received - self._body > MAX_HEAD + self._body // 4 and not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.send_400_response(f"The request line and headers are larger than {MAX_HEAD} bytes.")
            else:
                self.transport.abort()  # in the middle of an answer there is no place for an error

    def on_body(self, body: bytes) -> None:
        """Part of a body."""
        self._body += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The next bytes belong to the next request."""
        self._received = self._body = 0
        super().on_message_complete()
