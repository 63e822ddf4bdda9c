"""`Call`: one HTTP request as the log, the metrics and the traces tell of it. Never its prompt, its key or its query string.

The gate makes it and puts it into `CURRENT`, where whatever works on the request finds it; the figures of its answers are noted by
`metrics.ObservedRequest`. A client's `X-Request-Id` is only repeated to it; everything of ours has the id made here.
"""

from __future__ import annotations

import re
import time
import uuid
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

if TYPE_CHECKING:
    from lmdeploy.serving.admission import Place

#: what may be repeated in a header and a log line
_CLIENT_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
#: who calls without a key
ANYBODY = "-"

CURRENT: ContextVar[Call | None] = ContextVar("lmdeploy_call", default=None)


class Call:
    """Who asked for what, and what became of it. Times are of time.monotonic()."""

    __slots__ = (
        *("id", "client_id", "client", "key", "method", "path", "http_version", "began", "began_ns", "deadline"),
        *("route", "status", "error", "ended", "queue_seconds", "first_token", "prompt_tokens", "cached_tokens", "generated_tokens", "finish_reasons"),
        *("request", "session", "place", "body_size"),
    )

    def __init__(self, scope: Scope, seconds: float) -> None:
        self.id = uuid.uuid4().hex[:16]
        sent = header(scope, b"x-request-id")
        self.client_id = sent.decode() if _CLIENT_ID.fullmatch(sent) else None
        host, port = (scope.get("client") or ("-", 0))[:2]
        self.client = f"{host}:{port}"
        self.key = ANYBODY
        self.method: str = scope["method"]
        self.path = scope.get("raw_path", b"").decode("ascii", "replace")[:200]
        self.http_version: str = scope["http_version"]
        self.began, self.began_ns = time.monotonic(), time.time_ns()
        self.deadline = self.began + seconds
        self.route = "other"
        self.status = 499  # unless an answer is sent
        self.error: str | None = None  # its code: of a refusal, by gate or route, or of an answer that failed
        self.ended = self.began
        self.queue_seconds = 0.0  # in the server and in the engine
        self.first_token: float | None = None
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.finish_reasons: list[str] = []
        self.session: int | None = None
        self.place: Place | None = None  # among those that are worked on
        self.body_size = 0  # bytes, once it was read
        self.request: dict[str, Any] = {}  # sampling values, for traces

    @property
    def owner(self) -> str:
        """Who takes turns with others: the key's name, or without keys the address."""
        return self.key if self.key != ANYBODY else self.client.rpartition(":")[0]

    @property
    def seconds(self) -> float:
        """How long it took, or takes already."""
        return (self.ended if self.ended > self.began else time.monotonic()) - self.began

    @property
    def ttft(self) -> float | None:
        """Seconds from the request's arrival to its first token."""
        return None if self.first_token is None else self.first_token - self.began

    def text(self) -> str:
        """The line of the access log."""
        parts = [f'{self.client} "{self.method} {self.path} HTTP/{self.http_version}" {self.status} {self.seconds:.3f}s key={self.key}']
        if self.ttft is not None:
            parts.append(f"queue={self.queue_seconds:.3f}s ttft={self.ttft:.3f}s tokens={self.prompt_tokens}+{self.generated_tokens}")
        if self.finish_reasons:
            parts.append("finish=" + ",".join(self.finish_reasons[:8]))
        if self.error:
            parts.append(f"error={self.error}")
        if self.client_id:
            parts.append(f"client_id={self.client_id}")
        return " ".join([*parts, self.id])

    def fields(self) -> dict[str, Any]:
        """The same for a machine; what does not apply is null."""
        return {
            "id": self.id,
            "client_id": self.client_id,
            "client": self.client,
            "key": self.key,
            "method": self.method,
            "path": self.path,
            "route": self.route,
            "status": self.status,
            "seconds": round(self.seconds, 4),
            "queue_seconds": round(self.queue_seconds, 4),
            "ttft_seconds": None if self.ttft is None else round(self.ttft, 4),
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.generated_tokens,
            "finish_reasons": self.finish_reasons[:8],
            "error": self.error,
        }


def header(scope: Scope, name: bytes) -> bytes:
    """The first value of a header, b'' without one."""
    value: Any = next((v for k, v in scope["headers"] if k == name), b"")
    assert isinstance(value, bytes)
    return value
