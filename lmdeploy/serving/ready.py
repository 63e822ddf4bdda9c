"""GET /ready: whether the next request would be taken, for load balancers. (/health: whether the process should be restarted.)"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from lmdeploy.serving.service import Service, service_of

router = APIRouter(tags=["server"])


@router.head("/ready", include_in_schema=False)
@router.get("/ready", summary="200 while the next request would be taken, else 503 with the reason")
async def ready(request: Request) -> Response:
    """200 {"status": "ready"}, or 503 {"status": "not_ready", "message": why}."""
    service = service_of(request)
    problem = why_not_ready(service)
    if problem is None:
        return JSONResponse({"status": "ready", "message": ""})
    return JSONResponse({"status": "not_ready", "message": problem}, status_code=503, headers={"Retry-After": str(service.admission.retry_after())})


def why_not_ready(service: Service) -> str | None:
    """What stands against the next request, or None."""
    if service.lifecycle.draining:
        return f"the server is shutting down; {service.lifecycle.active} requests are being finished"
    if problem := service.frontend.trouble:
        return problem
    if service.frontend.asleep:
        return "the engine sleeps"
    if service.admission.full:
        return f"the queue is full: {service.admission.waiting} requests wait"
    return None
