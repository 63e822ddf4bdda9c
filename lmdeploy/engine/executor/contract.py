"""What the engine asks of whatever computes its steps: one process, several ranks, other machines.

`submit` and `result` are two calls so that a step can be launched while the one before it still runs. Plans are computed
strictly in the order of `submit`, results come in the same order; an executor must accept two submitted plans at a time.
"""

from __future__ import annotations

from typing import Protocol

from lmdeploy.engine.plan import StepPlan, StepResult
from lmdeploy.messages import EngineInfo, Order


class Executor(Protocol):
    """Computes step plans on one or more ranks.

    Failures: what concerns one sequence comes as `SlotResult.error`; an item of the same slot that is already launched may then
    compute on any token, its result is ignored. Any exception but EngineError from `submit` or `result`
    means "this step failed": the engine forgets every plan in flight (their results are still fetched and thrown away) and
    computes the sequences again one by one. Such a retry names its slot in `released` and in `new` and carries its whole
    block table, so it does not matter how much of the failed plan a rank had applied. Thus a rank must ignore a released
    slot that it does not know, and must be able to compute positions again. EngineError means that the executor is lost.

    Late tokens: where the next plan has been submitted, and has a sampled item of one token of the same slot, which is neither in its `released` nor in its
    `new`, a result may say LATE of a sampled row, and nothing else of it. That item then brings this row's token, and counts as the one that was asked for here:
    the last token alone, one position before what the plan said. It may be late again. The key and value that it left where the plan said are of no known token,
    and are written again by the item behind it. As the scheduler puts the items right in the plan itself, a rank keeps those that were submitted. LATE may also
    be said where the next plan has no item of the slot, and it is neither released nor new there: a later plan then asks once more, with the same last token.

    Answers that have ended: that a grammar allows nothing behind a token is said with it (`SlotResult.complete`), or by the result of the slot's next item, whose token is
    ENDED. Then there is no token more, and nothing else that the result brings of it counts. Where the next plan has no item of the slot, it is said with the token if
    it is known soon.
    """

    @property
    def info(self) -> EngineInfo:
        """Facts of the loaded model and its memory; fixed after construction."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Start a step; returns as soon as it is launched (or when it is done, where nothing runs beside the host)."""
        ...

    def result(self) -> StepResult:
        """Wait for the oldest submitted plan whose result was not fetched. Called exactly once per submitted plan. Its tokens hold until the next `submit`."""
        ...

    def prepare_ahead(self) -> bool:
        """Called when nothing was submitted: spend a fraction of a second on something that later steps would wait for. False: there is nothing (more)."""
        ...

    def obey(self, order: Order) -> None:
        """Sleep, wake, or take new weights; called when nothing was submitted. ConfigError and CheckpointError: nothing has changed."""
        ...

    def close(self) -> None:
        """Give back all memory and end all processes; may be called twice."""
        ...
