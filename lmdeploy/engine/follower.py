"""`Follower`: a matcher and the tokens that it took in, so that it can begin anew with another lexer when its own is full. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmdeploy.engine.grammar_compiler import Lexer, reason_of
from lmdeploy.engine.mask_wire import BROKEN, GOES_ON, STOPPED


class Follower:
    """Of one answer, which has generated these tokens already."""

    def __init__(self, lexer: Lexer, generated: Sequence[int] = ()) -> None:
        self._lexer, self._tokens = lexer, list(generated)
        self._begin(lexer.start)

    def _begin(self, start: Any) -> None:
        self._start, self.matcher = start, start.deep_copy()
        self.fits: bool = not self._tokens or self.matcher.consume_tokens(self._tokens)

    def advance(self, token: int) -> bool:
        """Take in a token; whether nothing may come behind it."""
        self._tokens.append(token)
        self.fits = False  # whatever happens in the library
        self.fits = self.matcher.consume_token(token)
        if not self.fits:
            self._begin(self._lexer.other_start(self._start))
        return self.fits and self.stopped

    @property
    def stopped(self) -> bool:
        """Whether nothing may come behind the tokens that there are; an answer has one at least."""
        return bool(self._tokens) and self.matcher.is_stopped()

    def fill(self, address: int, size: int) -> int:
        """Write the mask of the next token there, of so many bytes. GOES_ON, STOPPED, or BROKEN: neither with this lexer nor with a new one; see `matcher`."""
        made = 0
        while not (self.fits and self._try(address, size)):
            if made:
                return BROKEN
            full = self._start
            made += full is self._lexer.start  # else somebody else has made it, and it may be full again
            self._begin(self._lexer.other_start(full))
        return STOPPED if self.stopped else GOES_ON

    @property
    def reason(self) -> str:
        """Why there is no mask."""
        return f"the grammar's next tokens could not be worked out: {reason_of(self.matcher.get_error())}"

    def _try(self, address: int, size: int) -> bool:
        self.matcher.unsafe_compute_mask_ptr(address, size)
        return not self.matcher.is_error()
