"""Schemathesis reads our own OpenAPI page and asks every route what the page allows: no answer may be a 5xx or of a kind that the page does not name."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from lmdeploy.serving.page import BODIES
from tests.serving.running import RunningServer

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
#: fields that say how long an answer is; 'null' would mean the whole context
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "request_output_len")
#: of routes that answer in tokens; the others have no such field
LENGTH_OF = {
    "/v1/chat/completions": "max_completion_tokens",
    "/v1/completions": "max_completion_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/messages": "max_tokens",
    "/generate": "max_tokens",
    "/v1/chat/interactive": "request_output_len",
}


@pytest.fixture(scope="module")
def page(server: RunningServer) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def ask(operation: Any, examples: int, mode: GenerationMode = GenerationMode.POSITIVE) -> None:
    """Send what Schemathesis makes of the page's words, obeying them or (NEGATIVE) not, and check every answer."""

    @settings(max_examples=examples, deadline=None, phases=[Phase.generate], derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: schemathesis.Case) -> None:
        body = case.body
        if isinstance(body, dict):
            if "model" in body:
                body["model"] = "tiny"  # or every answer is a 404
            for name in LENGTHS:
                body.pop(name, None)
            if case.path in LENGTH_OF:
                body[LENGTH_OF[case.path]] = 2
        case.validate_response(case.call(timeout=60), checks=CHECKS)

    run()


@pytest.mark.parametrize("path", list(BODIES))
def test_every_route_answers_what_the_page_says(page: Any, path: str) -> None:
    ask(page[path]["POST"], 15)
    ask(page[path]["POST"], 4, GenerationMode.NEGATIVE)


def test_so_do_the_routes_without_a_body(page: Any) -> None:
    found = [result.ok() for result in page.get_all_operations()]
    without = [operation for operation in found if operation.path not in BODIES]
    assert {"/v1/models", "/health", "/metrics", "/anthropic/v1/models"} <= {operation.path for operation in without}
    for operation in without:
        assert operation.method.upper() == "GET" or "admin" in operation.definition.raw["tags"], f"{operation.label} has a body that BODIES does not name"
        ask(operation, 5)


def test_the_server_is_idle_and_well_afterwards(server: RunningServer) -> None:
    server.until_idle()
    assert server.http.get("/health").status_code == 200
    answer = server.http.post("/v1/completions", json={"model": "tiny", "prompt": "The sky is", "temperature": 0, "max_tokens": 4})
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 4
