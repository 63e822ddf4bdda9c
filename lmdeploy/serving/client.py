"""`APIClient`: a small client of the HTTP server. Methods are generators of dicts: one item, or one per event when streaming.

Errors of the server raise RequestError (4xx) or EngineError (5xx) with the server's own line. Those after which the same call may succeed later have types of
their own: `ServerBusy`, `ServerNotReady` and `Unreachable`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

from lmdeploy.errors import EngineError, OverloadedError, RequestError, SessionBusyError

#: codes of a stream that ended because the engine went away
GONE = ("engine_closed", "engine_failed")


class ServerBusy(OverloadedError):
    """The server takes no more requests now. `retry_after`: seconds after which it may, as it says."""

    retry_after: float | None = None


class ServerNotReady(EngineError):
    """The server answers, but its engine does not: starting, restarting, stopping (HTTP 503)."""

    retry_after: float | None = None


class Unreachable(EngineError):
    """Nobody answers at the address, or the connection broke before the answer was whole."""

    retry_after: float | None = None


class APIClient:
    """Talks to one server. `api_server_url` without a scheme means http. `timeout`: seconds without a byte after which a call fails; None = never.

    A context manager. One client may be used by one thread at a time; a generator that is closed, or forgotten, aborts its request.
    """

    def __init__(self, api_server_url: str, api_key: str | None = None, *, timeout: float | None = None) -> None:
        url = api_server_url if "://" in api_server_url else f"http://{api_server_url}"
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url.rstrip("/")
        # answers may take long, connecting may not
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(timeout, connect=10.0), trust_env=False)

    @property
    def available_models(self) -> list[str]:
        """Names of the served models."""
        return [card["id"] for card in self._get("/v1/models")["data"]]

    def health(self) -> dict[str, Any]:
        """The server's own opinion of itself."""
        return self._get("/health")

    def encode(self, input: str | list[str], do_preprocess: bool = False, add_bos: bool = True) -> tuple[Any, Any]:
        """(token ids, length); nested for a list of texts."""
        answer = next(self._post("/v1/encode", {"input": input, "do_preprocess": do_preprocess, "add_bos": add_bos}))
        return answer["input_ids"], answer["length"]

    def chat_completions_v1(
        self,
        model: str,
        messages: str | list[dict[str, Any]],
        temperature: float | None = None,
        top_p: float | None = None,
        n: int | None = None,
        max_tokens: int | None = None,
        stop: str | list[str] | None = None,
        stream: bool = False,
        **fields: Any,
    ) -> Iterator[dict[str, Any]]:
        """POST /v1/chat/completions; `fields` are the request's other fields, checked by the server. None: the server's default."""
        yield from self._post("/v1/chat/completions", _body(locals()))

    def completions_v1(
        self,
        model: str,
        prompt: str | list[Any],
        suffix: str | None = None,
        temperature: float | None = None,
        n: int | None = None,
        max_tokens: int | None = None,
        stream: bool = False,
        stop: str | list[str] | None = None,
        top_p: float | None = None,
        **fields: Any,
    ) -> Iterator[dict[str, Any]]:
        """POST /v1/completions; like `chat_completions_v1`."""
        yield from self._post("/v1/completions", _body(locals()))

    def generate(self, prompt: str | None = None, *, stream: bool = False, **fields: Any) -> Iterator[dict[str, Any]]:
        """POST /generate; `input_ids=[...]` instead of a prompt is possible."""
        given = {} if prompt is None else {"prompt": prompt}
        yield from self._post("/generate", {**given, "stream": stream, **fields})

    def chat_interactive_v1(
        self, prompt: str | list[dict[str, Any]], *, session_id: int = -1, interactive_mode: bool = False, stream: bool = False, **fields: Any
    ) -> Iterator[dict[str, Any]]:
        """POST /v1/chat/interactive: the server keeps the history of the session."""
        body = {"prompt": prompt, "session_id": session_id, "interactive_mode": interactive_mode, "stream": stream, **fields}
        yield from self._post("/v1/chat/interactive", body)

    def chat(self, prompt: str, session_id: int, request_output_len: int | None = 512, stream: bool = True, **fields: Any) -> Iterator[dict[str, Any]]:
        """One turn of a kept session."""
        yield from self.chat_interactive_v1(
            prompt, session_id=session_id, interactive_mode=True, stream=stream, request_output_len=request_output_len, **fields
        )

    def end_session(self, session_id: int) -> None:
        """Forget a session of `chat`."""
        list(self.chat_interactive_v1("", session_id=session_id, request_output_len=0))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> APIClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ------------------------------------------------------------------ inside

    def _get(self, path: str) -> dict[str, Any]:
        try:
            response = self._http.get(path)
        except httpx.HTTPError as e:
            raise self._unreachable(e) from e
        if response.is_error:
            raise error_of(response.status_code, response.text, response.headers.get("retry-after"))
        return object_of(response.text)

    def _post(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        try:
            with self._http.stream("POST", path, json=body) as response:
                if response.is_error:
                    raise error_of(response.status_code, response.read().decode("utf-8", "replace"), response.headers.get("retry-after"))
                if not body.get("stream"):
                    yield object_of(response.read().decode())
                    return
                for line in response.iter_lines():
                    item = event_of(line)
                    if item is not None:
                        yield item
        except httpx.HTTPError as e:
            raise self._unreachable(e) from e

    def _unreachable(self, error: Exception) -> EngineError:
        return Unreachable(f"no answer from {self.url}: {str(error) or type(error).__name__}; is the server running, and is the address right?")


def _body(given: dict[str, Any]) -> dict[str, Any]:
    """The request's fields of a method's arguments; what is None is left to the server."""
    values = {**given, **given["fields"]}
    return {name: value for name, value in values.items() if value is not None and name not in ("self", "fields")}


def event_of(line: str) -> dict[str, Any] | None:
    """The JSON of one line of a stream (with or without `data:`); None for blanks, comments, other SSE fields and the end mark. Raises a server's error."""
    text = line.removeprefix("data:").strip()
    if not text or text == "[DONE]" or text.startswith((":", "event:", "id:", "retry:")):
        return None
    item = object_of(text)
    if "error" in item and item["error"]:
        raise error_of(500, text)
    return item


def object_of(text: str) -> dict[str, Any]:
    """The JSON object in a text; raises EngineError when there is none."""
    try:
        value = json.loads(text)
    except ValueError as e:
        raise EngineError(f"the server sent no JSON: {text[:200]!r}") from e
    if not isinstance(value, dict):
        raise EngineError(f"the server sent {type(value).__name__}, not an object")
    return value


def error_of(status: int, text: str, retry_after: str | None = None) -> Exception:
    """The exception for a server's error: its status, its body's text, and its Retry-After header."""
    try:
        error = json.loads(text)["error"]
        message, code, param = str(error["message"]), error.get("code"), error.get("param")
    except (ValueError, KeyError, TypeError):
        message, code, param = text[:200] or "no details", None, None
    if status == 409:
        return SessionBusyError(message, param=param, code=code or "session_busy")
    if status == 429 or (status == 503 and code == "overloaded"):
        busy = ServerBusy(message, param=param, code=code or f"http_{status}")
        busy.retry_after = _seconds(retry_after)
        return busy
    if status == 503 or code in GONE:
        ready = ServerNotReady(message, code=code or "http_503")
        ready.retry_after = _seconds(retry_after)
        return ready
    if 400 <= status < 500:
        return RequestError(message, param=param, code=code or f"http_{status}")
    return EngineError(f"{message} (HTTP {status})", code=code or f"http_{status}")


def _seconds(text: str | None) -> float | None:
    """A Retry-After header in seconds, within reason; dates are not read."""
    return min(float(text), 3600.0) if text and text.isdecimal() else None
