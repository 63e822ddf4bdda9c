"""The exceptions that a user can meet. Each message says what was wrong, the value, the limit and what to do.

    LmdeployError
    |- ConfigError          an option of the engine, a template or the command line
    |- CheckpointError      a folder of weights: missing, broken, contradictory
    |- RequestError         one request: bad field, too long, unknown session  (HTTP 400)
    |  |- SessionBusyError  the session id is answering another request        (HTTP 409)
    |  `- OverloadedError   the waiting queue is full                          (HTTP 503)
    `- EngineError          the engine itself failed or is closed              (HTTP 500/503)

`RequestError` carries the field at fault (`param`) and an OpenAI-style `code`. User mistakes raise one of these;
`assert` is for our own invariants.
"""

from __future__ import annotations


class LmdeployError(Exception):
    """Base of every error that lmdeploy raises on purpose; its text is one clear line."""


class ConfigError(LmdeployError, ValueError):
    """An option has a value that cannot work."""


class CheckpointError(LmdeployError):
    """A model folder cannot be used: not a model, broken, incomplete or contradictory."""


class RequestError(LmdeployError, ValueError):
    """One request is invalid. `param` names the field, `code` is the machine-readable reason."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class SessionBusyError(RequestError):
    """The session id already has a request in flight."""


class OverloadedError(RequestError):
    """The waiting queue is full; try again later."""


class EngineError(LmdeployError, RuntimeError):
    """The engine failed, stopped, sleeps or was closed. `code` is the machine-readable reason."""

    def __init__(self, message: str, *, code: str = "engine_error") -> None:
        super().__init__(message)
        self.code = code
