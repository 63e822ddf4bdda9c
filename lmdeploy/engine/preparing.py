"""Requests whose grammar is being compiled: they wait here, not in the scheduler, so that no step waits for a compiler."""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any

from lmdeploy.engine.grammar_compiler import GrammarCompiler
from lmdeploy.errors import RequestError
from lmdeploy.messages import EngineOutput, EngineRequest

#: how long an engine with nothing else to do waits before it looks at its inbox again
IDLE_SECONDS = 0.01


@dataclass(slots=True)
class _Waiting:
    request: EngineRequest
    compiled: Future[Any]
    aborted: set[int] = field(default_factory=set)  # answers that nobody wants any more


class Preparing:
    """Used by the engine's thread only."""

    def __init__(self, grammars: GrammarCompiler | None) -> None:
        self._grammars = grammars
        self._waiting: dict[int, _Waiting] = {}

    def __len__(self) -> int:
        return sum(w.request.n for w in self._waiting.values())

    @property
    def unfinished(self) -> list[int]:
        """Ids of the requests."""
        return list(self._waiting)

    def add(self, request: EngineRequest) -> bool:
        """True when the request waits here; False when its grammar is compiled or it has none. Raises RequestError where there are no grammars."""
        grammar = request.sampling.grammar
        if grammar is None:
            return False
        if self._grammars is None:
            raise RequestError(
                "this model folder's tokenizer cannot be used for grammars; leave response_format out", param="response_format", code="unsupported"
            )
        compiled = self._grammars.prepare(grammar)
        if compiled.done() and compiled.exception() is None:
            return False
        self._waiting[request.request_id] = _Waiting(request, compiled)
        return True

    def take_ready(self, *, block: bool) -> tuple[list[tuple[EngineRequest, set[int]]], list[EngineOutput]]:
        """(requests to schedule, each with its aborted answers; last outputs of those that are refused). `block`: there is nothing else to do."""
        if block:
            wait([w.compiled for w in self._waiting.values()], IDLE_SECONDS, FIRST_COMPLETED)
        good: list[tuple[EngineRequest, set[int]]] = []
        refused: list[EngineOutput] = []
        for waiting in [w for w in self._waiting.values() if w.compiled.done()]:
            del self._waiting[waiting.request.request_id]
            error = waiting.compiled.exception()
            if error is None:
                good.append((waiting.request, waiting.aborted))
            else:
                refused += [_last(waiting.request, i, error) for i in range(waiting.request.n) if i not in waiting.aborted]
        return good, refused

    def abort(self, request_id: int, index: int | None) -> list[EngineOutput] | None:
        """The last outputs of the answers that end; None when the request is not here."""
        waiting = self._waiting.get(request_id)
        if waiting is None:
            return None
        ended = [i for i in range(waiting.request.n) if index in (None, i) and i not in waiting.aborted]
        waiting.aborted.update(ended)
        if len(waiting.aborted) == waiting.request.n:
            del self._waiting[request_id]
        return [_last(waiting.request, i, None) for i in ended]


def _last(request: EngineRequest, index: int, error: BaseException | None) -> EngineOutput:
    return EngineOutput(
        request_id=request.request_id,
        index=index,
        finish_reason="abort" if error is None else "error",
        num_prompt=len(request.token_ids),
        error=None if error is None else str(error),
        error_code=None if error is None else error.code if isinstance(error, RequestError) else "step_failed",
    )
