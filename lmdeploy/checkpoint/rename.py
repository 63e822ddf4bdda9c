"""Model names -> checkpoint names, for folders that store a known model under other names (a prefix, another export tool).

A model whose tree has the checkpoint's names needs none of this. Rules are tried in order; the first whose pattern matches the whole beginning of the
name rewrites it, and only it. `RenamedSource` is an ordinary `WeightSource`, so neither layers nor formats know of renaming.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lmdeploy.checkpoint.source import WeightSource


@dataclass(frozen=True, slots=True)
class Rename:
    """`pattern` (regular expression, matched at the name's beginning) -> `replacement` (may use \\1)."""

    pattern: str
    replacement: str


def checkpoint_name(name: str, rules: Sequence[Rename]) -> str:
    """The name under which the checkpoint stores the model's tensor `name`."""
    for rule in rules:
        renamed, count = re.subn(r"\A(?:" + rule.pattern + ")", rule.replacement, name, count=1)
        if count:
            return renamed
    return name


class RenamedSource:
    """A `WeightSource` that is asked with the model's names and holds the checkpoint's. `names()` and `finish` speak of the checkpoint's."""

    def __init__(self, source: WeightSource, rules: Sequence[Rename]) -> None:
        self._source, self._rules = source, tuple(rules)

    def names(self) -> set[str]:
        """Names as the checkpoint has them."""
        return self._source.names()

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return self._source.has(checkpoint_name(name, self._rules))

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape in the file."""
        return self._source.shape(checkpoint_name(name, self._rules))

    def dtype(self, name: str) -> torch.dtype:
        """Type in the file."""
        return self._source.dtype(checkpoint_name(name, self._rules))

    def take(self, name: str, out: torch.Tensor, rows: slice | None = None, cols: slice | None = None, *, shape: Sequence[int] | None = None) -> None:
        """Copy a slice of the renamed tensor."""
        self._source.take(checkpoint_name(name, self._rules), out, rows, cols, shape=shape)

    def take_ranges(self, name: str, out: torch.Tensor, ranges: Sequence[slice], cols: slice | None = None, *, shape: Sequence[int] | None = None) -> None:
        """Copy row ranges of the renamed tensor."""
        self._source.take_ranges(checkpoint_name(name, self._rules), out, ranges, cols, shape=shape)

    def finish(self, ignore: Sequence[str] = ()) -> None:
        """As the wrapped source; `ignore` matches the checkpoint's names."""
        self._source.finish(ignore)
