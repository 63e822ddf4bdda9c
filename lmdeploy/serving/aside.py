"""Work whose time depends on the size of a request or an answer: small ones are done at once, large ones in a thread, where they stall nobody's stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response

from lmdeploy import messages
from lmdeploy.serving.call import CURRENT

T = TypeVar("T")

#: bytes, about; what is larger is worked on in a thread
LARGE = 1 << 14


async def aside(work: Callable[..., T], *args: Any, size: int = 0) -> T:
    """`work(*args)`; in a thread when the request's body, or `size`, is large."""
    call = CURRENT.get()
    if max(size, 0 if call is None else call.body_size) < LARGE:
        return work(*args)
    return await asyncio.to_thread(work, *args)


async def json_answer(build: Callable[..., Any], *args: Any, size: int = 0) -> Response:
    """What `build(*args)` makes, as JSON; made and written aside when it or the request is large."""
    return Response(await aside(lambda: msgspec.json.encode(build(*args)), size=size), media_type="application/json")


def size_of(answers: Iterable[messages.Response]) -> int:
    """About how many bytes answers have on the wire."""
    return sum(len(a.text) + 8 * len(a.token_ids) + 100 * (len(a.logprobs or ()) + len(a.prompt_logprobs or ())) for a in answers)
