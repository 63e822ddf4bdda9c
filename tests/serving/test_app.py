"""What surrounds the routes: documentation page, health, metrics, keys, CORS, limits, the log."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lmdeploy.frontend import Frontend
from lmdeploy.serving.options import ServerConfig
from lmdeploy.serving.page import BODIES, EXAMPLES
from tests.serving.running import RunningServer

QUESTION = {"model": "tiny", "messages": [{"role": "user", "content": "Count from 1 to 5."}], "temperature": 0, "max_tokens": 8}


def figures(server: RunningServer) -> dict[str, float]:
    """/metrics without labels; buckets left out."""
    found: dict[str, float] = {}
    for line in server.http.get("/metrics").text.splitlines():
        match = re.fullmatch(r"(lmdeploy:\w+)\{([^}]*)\} (\S+)", line)
        if match and "le=" not in match[2]:
            reason = re.search(r'finished_reason="(\w+)"', match[2])
            found[match[1] + (f":{reason[1]}" if reason else "")] = float(match[3])
    return found


def test_the_page_loads_nothing_from_elsewhere(server: RunningServer) -> None:
    page = server.http.get("/")
    assert page.status_code == 200
    assert "SwaggerUIBundle" in page.text
    references = re.findall(r"""(?:src|href)=["']([^"']+)|url: ?['"]([^'"]+)""", page.text)
    files = [a or b for a, b in references]
    assert {"static/swagger-ui.css", "static/swagger-ui-bundle.js", "openapi.json"} <= set(files)
    for name in files:
        assert "//" not in name, f"{name} is not ours"
        if not name.startswith("data:"):
            assert server.http.get("/" + name).status_code == 200
    style = server.http.get("/static/swagger-ui.css").text
    assert not re.findall(r"url\((?!\"?data:)[^)]*\)", style), "the style sheet loads nothing"


def test_every_example_of_the_page_works_as_it_stands(server: RunningServer) -> None:
    schema = server.http.get("/openapi.json").json()
    tried = 0
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
            if body is None and method == "post" and "admin" not in operation["tags"]:
                raise AssertionError(f"{path} has no example")
            if body is not None:
                assert server.http.post(path, json=body).status_code == 200, path
                tried += 1
    assert tried == len(EXAMPLES) == 12


def test_the_schema_refers_only_to_what_it_has(server: RunningServer) -> None:
    text = server.http.get("/openapi.json").text
    names = set(re.findall(r"#/components/schemas/(\w+)", text))
    assert names <= set(server.http.get("/openapi.json").json()["components"]["schemas"])
    assert {"ChatRequest", "ChatMessage", "CompletionRequest", "GenerateRequest", "EncodeRequest"} <= names


def test_no_two_parts_of_the_page_share_a_name() -> None:
    seen: dict[str, object] = {}
    for model in BODIES.values():
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        for name, part in {**schema.pop("$defs", {}), model.__name__: schema}.items():
            assert seen.setdefault(name, part) == part, f"two different schemas are called {name}"


def test_the_page_tells_what_the_sampling_fields_mean_and_how_errors_look(server: RunningServer) -> None:
    schema = server.http.get("/openapi.json").json()
    for model in ("ChatRequest", "CompletionRequest", "GenerateRequest", "InteractiveRequest"):
        fields = schema["components"]["schemas"][model]["properties"]
        assert "0 = greedy" in fields["temperature"]["description"]
        assert "ends the answer" in fields["stop"]["description"]
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    for operations in schema["paths"].values():
        assert all(set(operation["responses"]) == {"200", "4XX"} for operation in operations.values())


def test_docs_and_metrics_can_be_switched_off(serve: Callable[..., RunningServer]) -> None:
    server = serve(disable_fastapi_docs=True, disable_metrics=True)
    for path in ("/", "/openapi.json", "/static/swagger-ui.css", "/metrics", "/docs", "/redoc"):
        assert server.http.get(path).status_code == 404, path


def test_models_lists_the_served_name(server: RunningServer) -> None:
    (card,) = server.http.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["owned_by"], card["max_model_len"]) == ("tiny", "model", "lmdeploy", 2048)
    assert card["permission"][0]["object"] == "model_permission"


def test_metrics_count_what_happened(server: RunningServer) -> None:
    before = figures(server)
    reply = server.http.post("/v1/chat/completions", json=QUESTION).json()
    after = figures(server)

    def grown(name: str) -> float:
        return after[f"lmdeploy:{name}"] - before.get(f"lmdeploy:{name}", 0)

    assert grown("prompt_tokens_total") == reply["usage"]["prompt_tokens"] == grown("request_prompt_tokens_sum")
    assert grown("generation_tokens_total") == 8 == grown("request_generation_tokens_sum")
    assert grown("request_success_total:length") == 1
    assert grown("e2e_request_latency_seconds_count") == grown("time_to_first_token_seconds_count") == 1
    assert after["lmdeploy:num_requests_running"] == after["lmdeploy:kv_blocks_used"] == 0
    assert after["lmdeploy:kv_blocks"] == 300


def test_metrics_see_a_running_request(server: RunningServer) -> None:
    with server.http.stream("POST", "/v1/chat/completions", json={**QUESTION, "max_tokens": None, "ignore_eos": True, "stream": True}) as reply:
        pieces = reply.iter_bytes()  # httpx closes the connection when this is forgotten
        next(pieces)
        now = figures(server)
        assert now["lmdeploy:num_requests_running"] == now["lmdeploy:num_api_requests_routed"] == 1
        assert 0 < now["lmdeploy:gpu_cache_usage_perc"] < 1
    server.until_idle()


def test_a_wrong_key_is_401(serve: Callable[..., RunningServer]) -> None:
    server = serve(api_keys=["s3cret", "other"])
    assert "security" in server.http.get("/openapi.json").json()
    for header in ("Bearer wrong", "Bearer", "s3cret", "Basic s3cret", "Bearer s3cret2", "Bearer \xff", ""):
        refused = server.http.get("/v1/models", headers={"Authorization": header.encode("latin-1")})
        assert refused.status_code == 401, header
        assert refused.json()["error"]["code"] == "invalid_api_key"
    for key in ("s3cret", "other"):
        assert server.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert server.http.get("/unknown").status_code == 401, "closed by default"


def test_what_is_shown_without_a_key_does_not_tell_where_the_model_lies(frontend: Frontend, model_folder: Path) -> None:
    running = RunningServer(frontend, ServerConfig(server_port=0, api_keys=["k"]))
    try:
        path = frontend.model_path
        assert "/" in path.strip("/")
        for page in ("/", "/openapi.json"):
            text = running.http.get(page).text
            assert path not in text and str(Path(path).parent) not in text, page
            assert Path(path).name in text, "the name that requests may give"
        body = running.http.get("/openapi.json").json()["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert running.http.post("/v1/completions", json=body, headers={"x-api-key": "k"}).status_code == 200
    finally:
        running.stop()


PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
COMPLETION = {"model": "tiny", "prompt": "a", "max_tokens": 1}


def page_may_call(server: RunningServer, origin: str, **headers: str) -> bool:
    """Whether a page of this origin passes: what it asks first, and what a browser sends without asking. Both must agree."""
    asked = server.http.options("/v1/completions", headers={**PREFLIGHT, "Origin": origin}).status_code == 200
    sent = server.http.post("/v1/completions", json=COMPLETION, headers={"Origin": origin, **headers})
    assert (sent.status_code == 200) == asked, (origin, sent.text)
    assert ("access-control-allow-origin" in sent.headers) == asked
    assert asked or sent.json()["error"]["code"] == "origin_not_allowed"
    return asked


def test_without_keys_only_pages_of_this_machine_may_call(server: RunningServer) -> None:
    for origin in ("http://localhost:3000", "https://127.0.0.1", "http://[::1]:8080", server.url):
        assert page_may_call(server, origin), origin
    for origin in ("https://page.example", "http://localhost.page.example", "http://page.example:80", "null", "http://127.0.0.1.page.example:1"):
        assert not page_may_call(server, origin), origin
    assert server.http.post("/v1/completions", json=COMPLETION).status_code == 200, "programs send no Origin"


def test_a_page_that_gives_its_own_name_to_this_machine_may_not_call(server: RunningServer) -> None:
    rebound = {"Origin": "http://page.example:23333", "Host": "page.example:23333"}
    assert server.http.post("/v1/completions", json=COMPLETION, headers=rebound).status_code == 403


def test_a_server_of_the_network_serves_its_own_page(serve: Callable[..., RunningServer]) -> None:
    server = serve(server_name="0.0.0.0")
    own = {"Origin": "http://gpu-box:23333", "Host": "gpu-box:23333"}
    assert server.http.post("/v1/completions", json=COMPLETION, headers=own).status_code == 200
    assert server.http.post("/v1/completions", json=COMPLETION, headers={**own, "Origin": "https://page.example"}).status_code == 403


def test_origins_that_are_named_may_call_and_with_keys_or_a_star_all(serve: Callable[..., RunningServer]) -> None:
    named = serve(allow_origins=["https://mine.example"])
    assert page_may_call(named, "https://mine.example") and not page_may_call(named, "https://page.example")
    assert not page_may_call(named, "http://localhost:3000"), "not named"
    assert named.http.post("/v1/completions", json=COMPLETION, headers={"Origin": named.url}).status_code == 200, "its own page"
    assert page_may_call(serve(allow_origins=["*"]), "https://page.example")
    keyed = serve(api_keys=["k"])
    assert page_may_call(keyed, "https://page.example", Authorization="Bearer k")
    strict = serve(allow_origins=["https://mine.example"], api_keys=["k"])
    assert strict.http.options("/v1/chat/completions", headers={**PREFLIGHT, "Origin": "https://page.example"}).status_code == 400
    assert strict.http.options("/v1/chat/completions", headers={**PREFLIGHT, "Origin": "https://mine.example"}).status_code == 200


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.name, record.getMessage()))


def test_the_log_has_one_line_a_request_and_no_prompt(server: RunningServer) -> None:
    logger, kept = logging.getLogger("lmdeploy"), Lines()
    level, access = logger.level, logging.getLogger("lmdeploy.access")
    logger.addHandler(kept)
    logger.setLevel(logging.INFO)
    access.setLevel(logging.INFO)
    try:
        server.http.get("/v1/models?key=hidden")
        reply = server.http.post("/v1/chat/completions", json=QUESTION)
        server.http.get("/health")
        time.sleep(0.1)
    finally:
        logger.removeHandler(kept)
        logger.setLevel(level)
        access.setLevel(logging.NOTSET)
    lines = [line for name, line in kept.lines if name == "lmdeploy.access"]
    assert len(lines) == 2
    assert re.search(r'"GET /v1/models HTTP/1.1" 200 ', lines[0])
    assert re.search(r'"POST /v1/chat/completions HTTP/1.1" 200 ', lines[1])
    assert lines[1].endswith(reply.headers["x-request-id"])
    everything = "\n".join(line for _, line in kept.lines)
    assert "Count" not in everything and "hidden" not in everything


def test_more_than_max_concurrent_requests_wait(serve: Callable[..., RunningServer]) -> None:
    server = serve(max_concurrent_requests=2)
    threads = [
        threading.Thread(target=server.http.post, args=("/v1/chat/completions",), kwargs={"json": {**QUESTION, "ignore_eos": True, "max_tokens": 60}})
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    most, waited = 0, 0.0
    while any(thread.is_alive() for thread in threads):
        now = figures(server)
        most, waited = max(most, int(now["lmdeploy:num_api_requests_routed"])), max(waited, now["lmdeploy:num_api_requests_waiting"])
        time.sleep(0.02)
    assert most == 2
    assert waited >= 1


def test_a_smaller_body_limit_is_kept(serve: Callable[..., RunningServer]) -> None:
    server = serve(max_body_mib=1)
    assert server.http.post("/v1/encode", json={"input": "a" * (2 << 20)}).status_code == 413
