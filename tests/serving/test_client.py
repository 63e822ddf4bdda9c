"""APIClient against a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from lmdeploy.errors import EngineError, RequestError, SessionBusyError
from lmdeploy.serving.client import APIClient
from tests.serving.running import RunningServer

COUNT = [{"role": "user", "content": "Count from 1 to 5."}]


@pytest.fixture
def client(server: RunningServer) -> Iterator[APIClient]:
    with APIClient(server.url.removeprefix("http://")) as opened:
        yield opened


def test_it_knows_the_models_and_tokenises(client: APIClient, server: RunningServer) -> None:
    assert client.available_models == ["tiny"]
    assert client.health()["status"] == "healthy"
    ids = server.frontend.tokenizer.encode("Hello")
    assert client.encode("Hello") == (ids, len(ids))
    assert client.encode(["Hello"], add_bos=False) == ([ids[1:]], [len(ids) - 1])


def test_answers_are_generators_of_one_or_many(client: APIClient) -> None:
    (whole,) = client.chat_completions_v1("tiny", COUNT, temperature=0, max_tokens=30)
    text = whole["choices"][0]["message"]["content"]
    assert "1, 2, 3, 4, 5" in text
    chunks = list(client.chat_completions_v1("tiny", COUNT, temperature=0, max_tokens=30, stream=True))
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == text
    (completion,) = client.completions_v1("tiny", "The sky is", temperature=0, max_tokens=4)
    assert completion["choices"][0]["text"]
    assert len(list(client.generate("The sky is", temperature=0, max_tokens=4, stream=True))) >= 4
    assert len(list(client.generate(input_ids=[1, 5], max_tokens=2))) == 1


def test_a_session_of_the_server_is_kept_and_ended(client: APIClient) -> None:
    list(client.chat("Hello", 21, 16))
    assert list(client.chat("Hello", 21, 16))[-1]["history_tokens"] > 0
    client.end_session(21)
    assert list(client.chat("Hello", 21, 16))[-1]["history_tokens"] == 0
    client.end_session(21)


def test_a_generator_that_is_closed_aborts_the_request(client: APIClient, server: RunningServer) -> None:
    answers = client.chat_completions_v1("tiny", COUNT, ignore_eos=True, stream=True)
    next(answers)
    answers.close()
    server.until_idle()


def test_errors_carry_the_servers_line(client: APIClient) -> None:
    with pytest.raises(RequestError, match="temperature") as bad:
        next(client.chat_completions_v1("tiny", COUNT, temperature=9))
    assert bad.value.param == "temperature"
    with pytest.raises(RequestError, match="does not exist"):
        next(client.completions_v1("other", "x", stream=True))
    running = client.chat_completions_v1("tiny", COUNT, ignore_eos=True, stream=True, session_id=31)
    next(running)
    with pytest.raises(SessionBusyError, match="31"):
        next(client.chat_completions_v1("tiny", COUNT, session_id=31))
    running.close()


def test_no_server_is_one_line() -> None:
    with APIClient("http://127.0.0.1:9") as nobody, pytest.raises(EngineError, match="is the server running"):
        nobody.available_models  # noqa: B018


def test_the_key_is_sent(serve: Callable[..., RunningServer]) -> None:
    server = serve(api_keys=["k1"])
    with APIClient(server.url, "k1") as with_key:
        assert with_key.available_models == ["tiny"]
    with APIClient(server.url) as without, pytest.raises(RequestError, match="API key"):
        without.available_models  # noqa: B018
