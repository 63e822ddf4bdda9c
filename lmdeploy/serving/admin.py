"""Routes that act on the server itself. The gate lets only the admin key through to them (see `middleware.ADMIN_FLAGS`)."""

from __future__ import annotations

import os
import signal

from fastapi import APIRouter
from starlette.responses import Response

router = APIRouter(tags=["admin"])


@router.get("/terminate", summary="Stop the server as SIGTERM does: running answers are finished first")
async def terminate() -> Response:
    """Answers at once; the server ends when its running requests have."""
    os.kill(os.getpid(), signal.SIGTERM)
    return Response()
