"""`lmdeploy serve gradio`: what is a model and what an address, and the mistakes that are told before anything starts. The page: tests/serving/test_ui.py."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmdeploy.cli.main import main
from lmdeploy.cli.ui import is_address


@pytest.mark.parametrize("target", ["http://localhost:23333", "https://models.example.org/v1", "localhost:23333", "10.0.0.7:80", "[::1]:23333"])
def test_an_address_is_recognised(target: str) -> None:
    assert is_address(target)


@pytest.mark.parametrize("target", [None, "./model", "internlm/internlm2-chat-1_8b", "/models/a", "C", "model:latest", "host:port"])
def test_everything_else_is_a_model(target: str | None) -> None:
    assert not is_address(target)


def test_a_folder_whose_name_looks_like_an_address_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model:8000").mkdir()
    assert not is_address("model:8000")


@pytest.mark.parametrize(
    "words, told",
    [
        (["http://localhost:1", "--tp", "1", "--model-name", "x"], "--model-name, --tp: no effect on the server at http://localhost:1"),
        (["./model", "--api-key", "k"], "--api-key is the key of a server"),
        (["./model", "--server-port", "70000"], "server_port"),
        (["./nowhere", "--server-port", "0"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    assert main(["serve", "gradio", *words]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


def test_without_gradio_the_package_to_install_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["serve", "gradio", "http://localhost:1"]) == 2
    assert "pip install 'lmdeploy[ui]'" in capsys.readouterr().err


def test_a_gradio_that_is_too_old_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace(__version__="6.0.2"))
    assert main(["serve", "gradio", "http://localhost:1"]) == 2
    assert "gradio 6.31 or newer, not 6.0.2: pip install -U 'lmdeploy[ui]'" in capsys.readouterr().err


def test_a_used_port_is_told_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "gradio", "--server-port", str(port)]) == 2
    assert f"port {port} of 127.0.0.1 is in use" in capsys.readouterr().err
