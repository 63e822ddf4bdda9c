"""The admin routes on real servers: sleep and wake, new weights, requests that are ended from outside."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from safetensors.torch import load_file, save_file

from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.frontend import Frontend
from lmdeploy.messages import Order
from lmdeploy.serving.options import ServerConfig
from tests.serving.running import RunningServer

CONFIG = TurbomindEngineConfig(dtype="float32", max_batch_size=4, cache_max_entry_count=1000, cpu_threads=1, max_prefill_token_num=256)
ADMIN = {"Authorization": "Bearer root"}
SHORT: dict[str, Any] = {"model": "tiny", "prompt": "Tell me of cats.", "ignore_eos": True, "temperature": 0, "max_tokens": 24}
LONG = {**SHORT, "max_tokens": 1900}
MIB = 1 << 20


def other_weights(model_folder: Path, folder: Path, factor: float = 1.1) -> Path:
    """A copy of the model whose matrices differ."""
    shutil.copytree(model_folder, folder)
    for path in folder.glob("*.safetensors"):
        tensors = {name: t * factor if t.dim() == 2 else t for name, t in load_file(path).items()}
        path.unlink()
        save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def weights(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that new weights may come from, with `other` in it."""
    root = tmp_path_factory.mktemp("weights")
    other_weights(model_folder, root / "other")
    shutil.copytree(model_folder, root / "first")
    return root


@pytest.fixture(scope="module")
def fresh_answer(weights: Path) -> str:
    """What a fresh start with the other weights says."""
    with Frontend.open(str(weights / "other"), CONFIG, separate_process=True, model_name="tiny") as frontend:
        running = RunningServer(frontend, ServerConfig(server_port=0, model_name="tiny"))
        text = say(running)
        running.stop()
    return text


@pytest.fixture(scope="module")
def admin(model_folder: Path, weights: Path) -> Iterator[RunningServer]:
    """A server with keys and an engine of its own, which these tests put to sleep."""
    with Frontend.open(str(model_folder), CONFIG, separate_process=True, model_name="tiny") as frontend:
        config = ServerConfig(server_port=0, model_name="tiny", admin_key="root", allowed_weights_path=str(weights))
        running = RunningServer(frontend, config)
        yield running
        running.stop()


@pytest.fixture(autouse=True)
def awake_with_the_first_weights(admin: RunningServer) -> Iterator[None]:
    yield
    post(admin, "/wakeup")
    assert post(admin, "/update_weights", path="first").status_code == 200


def post(server: RunningServer, route: str, **body: object) -> Any:
    return server.http.post(route, headers=ADMIN, json=body) if body else server.http.post(route, headers=ADMIN)


def say(server: RunningServer, **fields: object) -> str:
    reply = server.http.post("/v1/completions", json={**SHORT, **fields})
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def resident(server: RunningServer) -> int:
    return int(psutil.Process(server.frontend.client.pid).memory_info().rss)  # type: ignore[attr-defined]


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_gives_memory_back_and_waking_gives_the_same_answers(level: int, admin: RunningServer) -> None:
    text, before = say(admin), resident(admin)
    bill = admin.frontend.info.memory
    slept = post(admin, f"/sleep?level={level}")
    assert slept.status_code == 200 and slept.json()["asleep"] == ["kv_cache", "weights"]
    expected = bill.kv_pool + (bill.weights if level == 2 else 0)
    assert before - resident(admin) > 0.95 * expected - 8 * MIB, "what the bill says comes back"
    refused = admin.http.post("/v1/completions", json=SHORT)
    assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "asleep"
    for path, body in (("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}), ("/generate", {"prompt": "Hi"})):
        assert admin.http.post(path, json=body).status_code == 503
    assert (admin.http.get("/health").status_code, admin.http.get("/health").json()["status"]) == (200, "sleeping")
    assert admin.http.get("/ready").status_code == 503
    assert admin.http.get("/is_sleeping", headers=ADMIN).json() == {"is_sleeping": True, "asleep": ["kv_cache", "weights"]}
    assert admin.http.get("/v1/models").status_code == 200
    woken = post(admin, "/wakeup")
    assert woken.status_code == 200 and woken.json()["is_sleeping"] is False
    assert say(admin) == text
    assert abs(resident(admin) - before) < 0.05 * before


def test_parts_wake_one_by_one(admin: RunningServer) -> None:
    text = say(admin)
    post(admin, "/sleep?level=2")
    assert post(admin, "/wakeup?tags=weights").json()["asleep"] == ["kv_cache"]
    assert admin.http.post("/v1/completions", json=SHORT).status_code == 503
    assert post(admin, "/sleep").status_code == 200, "asleep already: no harm"
    assert post(admin, "/wakeup?tags=weights&tags=kv_cache").json()["asleep"] == []
    assert post(admin, "/wakeup").status_code == 200, "awake already: no harm"
    assert say(admin) == text


def test_an_engine_that_dies_asleep_comes_back_asleep(admin: RunningServer) -> None:
    text, restarts = say(admin), admin.frontend.stats().restarts
    post(admin, "/sleep?level=2")
    psutil.Process(admin.frontend.client.pid).kill()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 60
    while admin.frontend.stats().restarts == restarts or admin.frontend.trouble:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert admin.http.post("/v1/completions", json=SHORT).json()["error"]["code"] == "asleep"
    assert resident(admin) < admin.frontend.info.memory.total - 0.9 * admin.frontend.info.memory.kv_pool
    assert post(admin, "/wakeup").status_code == 200
    assert say(admin) == text


def test_new_weights_while_asleep_survive_a_crash(admin: RunningServer, fresh_answer: str) -> None:
    post(admin, "/sleep?level=2")
    post(admin, "/update_weights", path="other")
    post(admin, "/wakeup?tags=kv_cache")
    assert say(admin) == fresh_answer
    restarts = admin.frontend.stats().restarts
    psutil.Process(admin.frontend.client.pid).kill()  # type: ignore[attr-defined]
    deadline = time.monotonic() + 60
    while admin.frontend.stats().restarts == restarts or admin.frontend.trouble:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert admin.http.get("/ready").status_code == 200
    assert say(admin) == fresh_answer


def test_running_answers_end_before_sleep_and_long_ones_are_aborted(admin: RunningServer) -> None:
    with ThreadPoolExecutor(2) as pool:
        short = pool.submit(admin.http.post, "/v1/completions", json={**SHORT, "max_tokens": 200})
        admin.until_busy()
        assert post(admin, "/sleep?drain_seconds=60").status_code == 200
        assert short.result().json()["choices"][0]["finish_reason"] == "length"
        post(admin, "/wakeup")
        long = pool.submit(admin.http.post, "/v1/completions", json=LONG)
        admin.until_busy()
        assert post(admin, "/sleep?drain_seconds=0").status_code == 200
        assert long.result().json()["choices"][0]["finish_reason"] == "abort"


def test_orders_that_wait_for_long_keep_no_thread_from_others(admin: RunningServer) -> None:
    codes: list[int] = []

    def order() -> None:
        with httpx.Client(base_url=admin.url, headers=ADMIN, timeout=60, trust_env=False) as client:
            codes.append(client.post("/sleep?drain_seconds=3600").status_code)

    with admin.http.stream("POST", "/v1/completions", json={**LONG, "n": 4, "stream": True}) as reply:
        lines = reply.iter_lines()
        next(lines)
        threads = [threading.Thread(target=order) for _ in range(40)]  # asyncio's own pool has at most 32
        for thread in threads:
            thread.start()
        while admin.app.state.service.lifecycle.active < 41:  # type: ignore[attr-defined]
            time.sleep(0.01)
        assert admin.http.get("/metrics").status_code == 200
        assert admin.frontend.stats().running, "metrics came while the orders waited"
        assert post(admin, "/abort_request", abort_all=True).status_code == 200
        assert [line for line in lines if line][-1] == "data: [DONE]"
    for thread in threads:
        thread.join(60)
    assert codes == [200] * 40


def test_new_weights_answer_as_after_a_fresh_start(admin: RunningServer, fresh_answer: str) -> None:
    first = say(admin)
    done = post(admin, "/update_weights", path="other")
    assert done.status_code == 200, done.text
    assert say(admin) == fresh_answer != first
    post(admin, "/sleep?level=2")
    post(admin, "/wakeup")
    assert say(admin) == fresh_answer, "level 2 reads the weights that were served"
    pid = admin.frontend.client.pid  # type: ignore[attr-defined]
    psutil.Process(pid).kill()
    deadline = time.monotonic() + 60
    while admin.frontend.stats().restarts < 1 or admin.frontend.trouble:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert say(admin) == fresh_answer, "a new engine has them too"
    assert post(admin, "/update_weights", path="first").status_code == 200
    assert say(admin) == first


def test_weights_that_are_replaced_while_they_sleep_need_not_be_read_twice(admin: RunningServer, fresh_answer: str) -> None:
    post(admin, "/sleep?level=2")
    assert post(admin, "/update_weights", path="other").json()["asleep"] == ["kv_cache"]
    post(admin, "/wakeup?tags=kv_cache")
    assert say(admin) == fresh_answer


def test_running_answers_end_with_the_old_weights_and_waiting_ones_get_the_new(admin: RunningServer, weights: Path, fresh_answer: str) -> None:
    old = say(admin, max_tokens=200)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(say, admin, max_tokens=200)
        admin.until_busy()
        order = Order(action="update_weights", path=str(weights / "other"), drain_seconds=60)
        update = admin.frontend.client.obey(order)  # what the route does; in the engine's inbox before the next request
        after = pool.submit(say, admin)
        update.result()
        assert after.result() == fresh_answer
        assert running.result() == old


def broken(weights: Path, kind: str) -> str:
    """A folder below the allowed one that must be refused, by name."""
    folder = weights / kind
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(weights / "other", folder)
    name = "model.tok_embeddings.weight"
    path = next(p for p in sorted(folder.glob("*.safetensors")) if name in load_file(p))
    tensors = load_file(path)
    if kind == "shape":
        tensors[name] = tensors[name][:-1].clone()
    elif kind == "missing":
        del tensors[name]
        (folder / "model.safetensors.index.json").unlink()
    elif kind == "extra":
        tensors["model.more"] = tensors[name][:2].clone()
    elif kind == "type":
        tensors[name] = tensors[name].int()
    if kind == "corrupt":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "header":
        path.write_bytes(b"\xff" * 64)
    elif kind == "config":
        config = folder / "config.json"
        config.write_text(config.read_text().replace('"rms_norm_eps"', '"rms_norm_eps": 0.5, "other"'))
    elif kind == "link":
        target = weights.parent / "outside.safetensors"
        shutil.move(path, target)
        path.symlink_to(target)
    else:
        save_file(tensors, path, {"format": "pt"})
    return kind


@pytest.mark.parametrize("kind", ["shape", "missing", "extra", "type", "corrupt", "header", "config", "link"])
def test_weights_that_do_not_fit_are_refused_and_the_old_ones_go_on(kind: str, admin: RunningServer, weights: Path) -> None:
    text = say(admin)
    refused = post(admin, "/update_weights", path=broken(weights, kind))
    assert refused.status_code == 400, refused.text
    assert "\n" not in refused.json()["error"]["message"]
    assert say(admin) == text
    assert admin.frontend.trouble is None


@pytest.mark.parametrize("path", ["..", "/etc", "../../..", "nowhere", "other/model.safetensors.index.json", "\0", "other/../.."])
def test_foreign_paths_are_refused(path: str, admin: RunningServer) -> None:
    refused = post(admin, "/update_weights", path=path)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_path")


def test_serialised_tensors_are_no_way_in(admin: RunningServer) -> None:
    refused = post(admin, "/update_weights", serialized_named_tensors="gASV", load_format=None, finished=True)
    assert refused.status_code == 400
    assert "serialized_named_tensors" in refused.text or "load_format" in refused.text or "finished" in refused.text


@pytest.mark.parametrize("path", ["/sleep?level=3", "/sleep?level=x", "/wakeup?tags=all", "/sleep?drain_seconds=-1", "/sleep?drain_seconds=nan"])
def test_bad_values_are_told(path: str, admin: RunningServer) -> None:
    refused = post(admin, path)
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["code"] == "invalid_value"
    assert admin.http.get("/is_sleeping", headers=ADMIN).json()["is_sleeping"] is False


def test_new_weights_need_a_folder_that_was_allowed(serve: Any) -> None:
    server = serve(admin_key="root")
    refused = server.http.post("/update_weights", headers=ADMIN, json={"path": "/tmp"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "updates_disabled")


def test_admin_routes_need_the_admin_key(admin: RunningServer) -> None:
    for method, path in (("POST", "/sleep"), ("POST", "/wakeup"), ("GET", "/is_sleeping"), ("POST", "/update_weights"), ("POST", "/abort_request")):
        assert admin.http.request(method, path, json={}).status_code == 401, path
    assert admin.http.get("/health").json()["status"] == "healthy"


@pytest.mark.parametrize("by", ["session_id", "request_id", "abort_all"])
def test_requests_are_ended_from_outside(by: str, admin: RunningServer) -> None:
    with admin.http.stream("POST", "/v1/completions", json={**LONG, "stream": True, "session_id": 7}) as mine:
        lines = mine.iter_lines()
        next(lines)
        with admin.http.stream("POST", "/v1/completions", json={**LONG, "stream": True, "session_id": 8}) as other:
            others = other.iter_lines()
            next(others)
            body = {"session_id": 7} if by == "session_id" else {"request_id": mine.headers["x-lmdeploy-id"]} if by == "request_id" else {"abort_all": True}
            done = post(admin, "/abort_request", **body)
            assert done.json() == {"success": True, "aborted": 2 if by == "abort_all" else 1}
            rest = [line for line in lines if line]
            assert '"finish_reason":"abort"' in rest[-2] and rest[-1] == "data: [DONE]"
            if by == "abort_all":
                assert '"finish_reason":"abort"' in [line for line in others if line][-2]
            else:
                assert next(line for line in others if line)
    admin.until_idle()
    assert post(admin, "/abort_request", session_id=7).json()["aborted"] == 0


@pytest.mark.parametrize("body", [{}, {"session_id": 1, "abort_all": True}, {"abort_all": False}, {"session_id": "x"}])
def test_an_abort_names_exactly_one_thing(body: dict[str, Any], admin: RunningServer) -> None:
    assert admin.http.post("/abort_request", headers=ADMIN, json=body).status_code == 400


def test_an_api_key_ends_its_own_requests_only(serve: Any) -> None:
    server = serve(api_key_lines=["a:key-a", "b:key-b"], admin_key="root", enable_abort_handling=True)
    a, b = {"Authorization": "Bearer key-a"}, {"Authorization": "Bearer key-b"}
    with server.http.stream("POST", "/v1/completions", headers=a, json={**LONG, "stream": True, "session_id": 3}) as reply:
        lines = reply.iter_lines()
        next(lines)
        for body in ({"abort_all": True}, {"session_id": 3}, {"request_id": reply.headers["x-lmdeploy-id"]}):
            assert server.http.post("/abort_request", headers=b, json=body).json()["aborted"] == 0
        assert server.http.post("/abort_request", headers=a, json={"session_id": 3}).json()["aborted"] == 1
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.http.post("/abort_request", json={"abort_all": True}).status_code == 401
