"""Errors on the wire: one body shape, real HTTP statuses, one clear line.

The body has OpenAI's nested `error` object and the same keys at top level (`object`, `message`, `type`, `code`, `param`), where this
system's older clients look. Nothing of a traceback, a path or another user's request ever goes out.
"""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from lmdeploy import messages
from lmdeploy.errors import EngineError, OverloadedError, RequestError, SessionBusyError
from lmdeploy.log import get_logger
from lmdeploy.serving.aside import aside
from lmdeploy.serving.call import CURRENT
from lmdeploy.serving.openai.protocol import Body

B = TypeVar("B", bound=Body)

logger = get_logger(__name__)

RETRY_SECONDS = "5"
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
    504: "timeout_error",
}  # fmt: skip
#: routes whose errors have Anthropic's form, the gate's included
_ANTHROPIC = ("/v1/messages", "/anthropic/")
#: code of a failed answer -> HTTP status; all others are the request's fault
_CODE_STATUS = {
    "engine_error": 500, "step_failed": 500, "engine_failed": 503, "engine_closed": 503, "overloaded": 503, "asleep": 503, "session_busy": 409, "timeout": 504,
}  # fmt: skip
MAX_SHOWN = 80


#: values of a request's JSON, as its commas count them
MAX_VALUES = 1 << 20


class HttpError(Exception):
    """An answer that is an error, with its status."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


def error_body(status: int, message: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    flat = {"message": message, "type": kind, "param": param, "code": code}
    return {"error": flat, "object": "error", **flat}


def anthropic_error(error: HttpError) -> dict[str, Any]:
    """The JSON of an error as Anthropic's clients expect it."""
    kind = _ANTHROPIC_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def error_response(error: Exception, path: str = "") -> Response:
    """The answer for any exception of the route at `path`, in the form of its protocol."""
    e = as_http_error(error)
    headers = {"Retry-After": RETRY_SECONDS} if e.status in (429, 503) else {}
    if e.code == "timeout":  # OpenAI's and Anthropic's clients would send it again, and make a slow server slower
        headers["x-should-retry"] = "false"
    if e.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = anthropic_error(e) if path.startswith(_ANTHROPIC) else error_body(e.status, e.message, e.code, e.param)
    return JSONResponse(body, status_code=e.status, headers=headers)


def as_http_error(error: Exception) -> HttpError:
    """Status, code and line of an exception; what we did not foresee is a 500 without details."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, SessionBusyError):
        return HttpError(409, str(error), code="session_busy", param=error.param)
    if isinstance(error, OverloadedError):
        return HttpError(503, str(error), code="overloaded", param=error.param)
    if isinstance(error, RequestError):
        return HttpError(400, _one_line(str(error)), code=error.code, param=error.param)
    if isinstance(error, ClientGone):
        return HttpError(499, "Client disconnected", code="client_disconnected")
    if isinstance(error, EngineError):
        return HttpError(503, _one_line(str(error)), code=error.code)
    return HttpError(500, "internal error; the server's log has the details", code="internal_error")


def raise_if_failed(response: messages.Response, failure: str | None) -> None:
    """An answer that ended with an error before any text becomes an HTTP error."""
    if response.finish_reason == "error":
        raise failed_answer(response, failure)


def failed_answer(response: messages.Response, failure: str | None) -> HttpError:
    """The HTTP error of an answer that failed; 503 when the whole engine did."""
    code = response.error_code or "engine_error"
    status = 503 if failure else _CODE_STATUS.get(code, 400)
    return HttpError(status, _one_line(response.error_message or "the answer failed"), code=code)


async def read_body(request: Request, model: type[B]) -> B:
    """The checked body of a request. Raises HttpError 400 with the field's path; size is bounded by the middleware."""
    content_type = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise HttpError(400, f"the content type is {content_type[:MAX_SHOWN]!r}; send application/json", code="invalid_content_type")
    try:
        body = await request.body()
    except ClientDisconnect:
        raise ClientGone from None
    if (call := CURRENT.get()) is not None:
        call.body_size = len(body)
    if (commas := body.count(b",")) > MAX_VALUES:  # parsing them all would hold up everybody, and take a hundred times their memory
        raise HttpError(400, f"the body has {commas} commas; lists and objects of more than {MAX_VALUES} values in all are not read", code="too_many_values")
    try:
        checked = await aside(model.model_validate_json, body)
    except ValidationError as e:
        raise _validation_error(e, model) from None
    if checked.model_extra:  # only an OpenBody takes any
        logger.info("%s: ignored fields: %s", request.url.path, ", ".join(sorted(checked.model_extra))[:200])
    return checked


def _validation_error(error: ValidationError, model: type[Body]) -> HttpError:
    """The most telling of pydantic's findings, as one line: rather a bad value than a wrong type, and the deepest one, because the
    other branches of a union complain too, about a form that the user did not mean."""
    findings = error.errors(include_url=False, include_context=False)
    worst = max(findings, key=lambda f: (f["type"] == "extra_forbidden", not f["type"].endswith("_type"), len(f["loc"])))
    path = ".".join(str(part) for part in worst["loc"] if isinstance(part, int) or part.isidentifier() and part not in ("str", "int", "list", "dict", "bool"))
    if worst["type"] == "json_invalid":
        return HttpError(400, f"the body is not valid JSON: {_one_line(worst['msg']).removeprefix('Invalid JSON: ')}", code="invalid_json")
    if worst["type"] == "extra_forbidden":
        return HttpError(400, _unknown_field(path, model), code="unknown_field", param=path)
    if worst["type"] == "missing":
        return HttpError(400, f"{path}: this field is required", code="missing_field", param=path)
    shown = repr(worst["input"])
    shown = shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}..."
    return HttpError(400, _one_line(f"{path or 'body'}: {worst['msg']} (got {shown})"), code="invalid_value", param=path or None)


def _unknown_field(path: str, model: type[Body]) -> str:
    name = path.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(name[:100], model.model_fields, 1) if "." not in path else []
    hint = f"; did you mean '{near[0]}'?" if near else ""
    return f"unknown field '{path[:MAX_SHOWN]}'{hint}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:1000]
