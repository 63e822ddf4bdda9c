"""What is kept of a step so that the next one can be launched without being looked at whole: each of its sequences a token further."""

from __future__ import annotations

from dataclasses import dataclass

from lmdeploy.engine.batch import LENGTH_STEP
from lmdeploy.engine.plan import Ints

#: so many steps in a row leave sequences in an order: it is one of lengths, and only roughly
REPEATS = LENGTH_STEP // 8


@dataclass(frozen=True, slots=True)
class GuidedRows:
    """The rows of a step with grammars, in its order."""

    slots: Ints
    lengths: Ints  # tokens known after it
    order: Ints  # their places in its plan


@dataclass(slots=True)
class Repeat:
    """What lets the next step be the last one once more: a graph computed it, its tokens were taken as they came, or with masks, on its line."""

    count: int  # of tokens
    left: int  # times that it may be repeated; then sequences are put in the order of their lengths again
    guided: GuidedRows | None = None  # where some have a grammar
