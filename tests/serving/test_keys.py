"""Keys: where they come from, what they open, and that nothing but a name is ever told of them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import BaseRoute, Mount

from lmdeploy.errors import ConfigError
from lmdeploy.serving import admin
from lmdeploy.serving.keys import KeyRing
from lmdeploy.serving.middleware import _OPEN, _OPEN_FOLDER
from lmdeploy.serving.options import ServerConfig
from tests.serving.running import RunningServer

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")


def routes_of(routes: list[BaseRoute], prefix: str = "") -> Iterator[str]:
    """Every path that the app routes, those of included routers and mounts too."""
    for route in routes:
        inner = getattr(getattr(route, "original_router", None), "routes", None)
        if inner is not None:
            yield from routes_of(inner, prefix + str(route.include_context.prefix))  # type: ignore[attr-defined]
        elif isinstance(route, Mount):
            yield from (f"{prefix}{route.path}{rest}" for rest in ("", "/", "/swagger-ui.css", "/%2e%2e/v1/models", "/nothing"))
        else:
            yield prefix + str(route.path)  # type: ignore[attr-defined]


def spellings(path: str) -> set[str]:
    """The path as people and attackers write it."""
    path = path.replace("{name}", "tiny").replace("{model}", "tiny").replace("{path:path}", "x")
    return {path, path + "/", "/" + path, path.upper(), path.title(), path + "%20", path.replace("/", "//"), path + "?api_key=sesame"}


def is_public(path: str) -> bool:
    plain = path.split("?")[0]
    return plain in _OPEN or plain.startswith(_OPEN_FOLDER)


@pytest.fixture(scope="module")
def guarded(frontend: Any) -> Iterator[RunningServer]:
    """A server with two keys and an admin key."""
    running = RunningServer(frontend, ServerConfig(server_port=0, model_name="tiny", api_keys=["sesame", "open-up"], admin_key="root-key"))
    yield running
    running.stop()


def test_every_route_in_every_spelling_and_method_is_closed(guarded: RunningServer) -> None:
    paths = sorted(set(routes_of(guarded.app.routes)))
    assert {"/v1/chat/completions", "/terminate", "/metrics", "/static/swagger-ui.css"} <= set(paths)
    asked = 0
    for path, method in itertools.product({s for p in paths for s in spellings(p)}, METHODS):
        status = guarded.http.request(method, guarded.url + path).status_code
        if is_public(path):
            assert status != 401, (method, path)
        else:
            assert status == 401, (method, path, status)
        asked += 1
    assert asked > 500


def admin_calls() -> Iterator[tuple[str, str]]:
    for route in admin.router.routes:
        for path in sorted(spellings(route.path)):  # type: ignore[attr-defined]
            yield from ((method, path) for method in METHODS)


def test_an_api_key_opens_no_admin_route(guarded: RunningServer) -> None:
    for method, path in admin_calls():
        reply = guarded.http.request(method, guarded.url + path, headers={"Authorization": "Bearer sesame"})
        assert reply.status_code in (403, 404), (method, path, reply.status_code)
    refused = guarded.http.get("/terminate", headers={"x-api-key": "sesame"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_only")


def test_without_an_admin_key_there_are_no_admin_routes(server: RunningServer) -> None:
    for method, path in admin_calls():
        assert server.http.request(method, server.url + path).status_code in (403, 404), (method, path)
    refused = server.http.get("/terminate")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_disabled")
    assert "--admin-key" in refused.json()["error"]["message"]


def test_the_admin_key_opens_everything(guarded: RunningServer) -> None:
    key = {"Authorization": "Bearer root-key"}
    assert guarded.http.get("/v1/models", headers=key).status_code == 200
    assert guarded.http.post("/terminate", headers=key).status_code == 405, "past the gate: the route wants GET"


def test_a_flag_opens_its_admin_route_to_clients(serve: Callable[..., RunningServer]) -> None:
    server = serve(api_keys=["k"], allow_terminate_by_client=True)
    assert server.http.post("/terminate").status_code == 401, "the ordinary rule"
    assert server.http.post("/terminate", headers={"Authorization": "Bearer k"}).status_code == 405, "past the gate"


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": "Bearer sesame"}, {"authorization": "bearer open-up"}, {"x-api-key": "sesame"}, {"Authorization": "Bearer x", "X-Api-Key": "open-up"}],
)
def test_a_key_may_come_as_openai_or_anthropic_send_it(headers: dict[str, str], guarded: RunningServer) -> None:
    assert guarded.http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("value", ["-", "sesam", "sesamee", "SESAME", "root", "\xff", "key1", "sesame,open-up", "a" * 5000])
def test_anything_else_is_no_key(value: str, guarded: RunningServer) -> None:
    for header, text in (("x-api-key", value), ("Authorization", f"Bearer {value}"), ("Authorization", value), ("Authorization", f"Basic {value}")):
        assert guarded.http.get("/v1/models", headers={header: text.encode("latin-1")}).status_code == 401, header


def test_a_websocket_is_no_way_around_the_gate(server: RunningServer) -> None:
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
    assert httpx.get(server.url + "/v1/models", headers=upgrade, trust_env=False).status_code == 200, "answered as plain HTTP"


def test_keys_come_from_flags_file_and_environment_with_their_names(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# our keys\n\nteam-a:aaa:with:colons\nbbb\n  ops : ccc \n")
    ring = KeyRing(ServerConfig(api_keys=["one:literal"], api_key_lines=["ci:ddd"], api_keys_file=str(file)))
    names = {key: ring.find(key.encode()) for key in ("one:literal", "ddd", "aaa:with:colons", "bbb", "ccc", "aaa", "", "ops")}
    assert names == {"one:literal": "key1", "ddd": "ci", "aaa:with:colons": "team-a", "bbb": "key4", "ccc": "ops", "aaa": None, "": None, "ops": None}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no key"),
        ("# only a comment\n", "holds no key"),
        ("bad name:secretword", "line 1: a key's name"),
        ("x:secretword\nadmin:secretword2", "line 2"),
        ("x:\n", "line 1: the key is empty"),
        ("x:secret word", "line 1"),
        ("x:secretword\nx:secretword2", "two API keys are named 'x'"),
        ("\n".join(f"k{i}" for i in range(1001)), "at most 1000"),
        ("k" * (1 << 21), "at most 1048576"),
    ],
)
def test_a_wrong_file_is_one_line_that_does_not_tell_the_keys(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        KeyRing(ServerConfig(api_keys_file=str(tmp_path / "keys")))
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"api_keys_file": "/no/such"}, {"admin_key_file": "/no/such"}, {"api_keys": ["a"], "admin_key": "a"}, {"api_key_lines": []}]
)
def test_sources_that_cannot_be_used_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        KeyRing(ServerConfig(**options))


def test_the_admin_keys_file_holds_one_key(tmp_path: Path) -> None:
    file = tmp_path / "admin"
    file.write_text("# admin\nroot:key\n")
    assert KeyRing(ServerConfig(admin_key_file=str(file))).find(b"root:key") == "admin"
    file.write_text("a\nb\n")
    with pytest.raises(ConfigError, match="exactly one"):
        KeyRing(ServerConfig(admin_key_file=str(file)))


def test_a_reload_takes_the_new_file_and_survives_a_broken_one(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("a:old\n")
    ring = KeyRing(ServerConfig(api_keys_file=str(file)))
    file.write_text("a:new\nb:more\n")
    take = ring.read_again()
    assert ring.find(b"old") == "a", "until they are taken"
    assert take() == 2
    assert (ring.find(b"old"), ring.find(b"new"), ring.find(b"more")) == (None, "a", "b")
    for broken in ("", "bad name:x"):
        file.write_text(broken)
        with pytest.raises(ConfigError):
            ring.read_again()
        assert ring.find(b"new") == "a", "as it was"


def test_a_config_does_not_show_its_keys(caplog: pytest.LogCaptureFixture) -> None:
    config = ServerConfig(api_keys=["sesame"], admin_key="root-key", api_key_lines=["x:third"])
    for secret in ("sesame", "root-key", "third"):
        assert secret not in repr(config) and secret not in str(config)


def test_the_log_names_the_key_and_never_shows_it(guarded: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="lmdeploy"):
        guarded.http.get("/v1/models?key=sesame", headers={"Authorization": "Bearer sesame"})
        guarded.http.get("/v1/models", headers={"x-api-key": "guess-me"})
    assert "sesame" not in caplog.text and "guess-me" not in caplog.text
