"""Requests whose grammar is being compiled: they wait here, not in the scheduler, so that no step waits for a compiler.

What was compiled goes with the request (its sequences hold it), so that a slot can be set up at any later time without a compiler. Hence the number of
grammars that are compiled ahead is bounded here: a large one takes some megabytes.
"""

from __future__ import annotations

from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from lmdeploy.errors import RequestError
from lmdeploy.grammar import Grammar
from lmdeploy.messages import EngineOutput, EngineRequest

#: how long an engine with nothing else to do waits before it looks at its inbox again
IDLE_SECONDS = 0.01
#: compiled grammars in memory from which on further ones wait until requests have ended; more than a compiler keeps for nobody
MAX_COMPILED = 256


class Grammars(Protocol):
    """What compiles them: `GrammarCompiler` in this process, `MaskPool` in others."""

    @property
    def num_compiled(self) -> int:
        """Grammars that are compiled or are about to be."""
        ...

    def prepare(self, grammar: Grammar, owner: str = "", answers: int = 1) -> Future[Any]:
        """Compile one for so many answers, those of each owner in turn; it stays compiled for as long as the future is held."""
        ...

    def close(self) -> None:
        """End what was begun; may be called twice."""
        ...


@dataclass(slots=True)
class _Waiting:
    request: EngineRequest
    compiled: Future[Any] | None = None  # None: too many are
    aborted: set[int] = field(default_factory=set)  # answers that nobody wants any more


@dataclass(frozen=True, slots=True)
class Ready:
    """A request whose grammar is compiled, for as long as `compiled` is held."""

    request: EngineRequest
    compiled: Future[Any]
    aborted: set[int]


class Preparing:
    """Used by the engine's thread only."""

    def __init__(self, grammars: Grammars | None) -> None:
        self._grammars = grammars
        self._waiting: dict[int, _Waiting] = {}
        self._always = None if grammars is None else grammars.prepare(Grammar("json_object"), answers=0)  # held: the commonest one is always compiled

    def __len__(self) -> int:
        return sum(w.request.n for w in self._waiting.values())

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def unfinished(self) -> list[int]:
        """Ids of the requests."""
        return list(self._waiting)

    def add(self, request: EngineRequest) -> None:
        """Let a request that has a grammar wait here. Raises RequestError where there are no grammars."""
        if self._grammars is None:
            raise RequestError(
                "this model folder's tokenizer cannot be used for grammars; leave response_format out", param="response_format", code="unsupported"
            )
        self._waiting[request.request_id] = _Waiting(request)

    def _compile_more(self) -> None:
        assert self._grammars is not None
        for waiting in self._waiting.values():
            if waiting.compiled is None and self._grammars.num_compiled < MAX_COMPILED:
                grammar = waiting.request.sampling.grammar
                assert grammar is not None
                waiting.compiled = self._grammars.prepare(grammar, waiting.request.owner, waiting.request.n)

    def take_ready(self, *, block: bool) -> tuple[list[Ready], list[EngineOutput]]:
        """(requests to schedule; last outputs of those that are refused). `block`: there is nothing else to do."""
        self._compile_more()
        if block:
            wait([w.compiled for w in self._waiting.values() if w.compiled is not None], IDLE_SECONDS, FIRST_COMPLETED)
        good: list[Ready] = []
        refused: list[EngineOutput] = []
        for waiting in list(self._waiting.values()):
            if waiting.compiled is None or not waiting.compiled.done():
                continue
            del self._waiting[waiting.request.request_id]
            error = waiting.compiled.exception()
            if error is None:
                good.append(Ready(waiting.request, waiting.compiled, waiting.aborted))
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
