"""Bad input where it comes in: broken folders, options that cannot work, closed streams, clients and engines that vanish.

Each must end in one clear line and exit code 2, or be survived; nothing may be left running, held, or written as a traceback.
Wrong fields of HTTP requests are in tests/serving/test_bad_input.py.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from lmdeploy import GenerationConfig, TurbomindEngineConfig
from lmdeploy.errors import CheckpointError, ConfigError, LmdeployError, RequestError
from lmdeploy.messages import Response
from lmdeploy.pipeline import Pipeline, pipeline

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SMALL = TurbomindEngineConfig(cache_max_entry_count=40, max_prefill_token_num=256)
SHARD = "model-00002-of-00003.safetensors"
Spoil = Callable[[Path], None]


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """The embedded model once more: small files copied, so that they can be spoiled, large ones linked."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in model_folder.iterdir():
        if file.suffix == ".safetensors":
            (copy / file.name).symlink_to(file)
        else:
            (copy / file.name).write_bytes(file.read_bytes())
    return copy


def config(**changes: Any) -> Spoil:
    """Other values in config.json."""

    def spoil(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


def content(name: str, data: bytes | None) -> Spoil:
    """Another content of a file, or no such file."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink()
        if data is not None:
            (folder / name).write_bytes(data)

    return spoil


def cut(folder: Path) -> None:
    """A shard that was half downloaded."""
    data = (folder / SHARD).read_bytes()
    content(SHARD, data[: len(data) // 2])(folder)


def no_tokenizer(folder: Path) -> None:
    """No file that could be a vocabulary."""
    (folder / "tokenizer.json").unlink()


def foreign_weights(folder: Path) -> None:
    """config.json and weights of a model with 131 tokens below a tokenizer with 5120."""
    from tests.helpers import write_llama

    for file in (*folder.glob("*.safetensors"), folder / "model.safetensors.index.json", folder / "generation_config.json"):
        file.unlink()
    write_llama(folder)


def shard_elsewhere(folder: Path) -> None:
    """An index that points out of the folder."""
    index = folder / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"][next(iter(table["weight_map"]))] = "../../secret"
    index.write_text(json.dumps(table))


FOLDERS: dict[str, tuple[Spoil, list[str]]] = {
    "no config": (content("config.json", None), ["is not a model folder", "config.json"]),
    "broken config": (content("config.json", b'{"architectures": ['), ["config.json", "not valid JSON"]),
    "config of bytes": (content("config.json", b"\xff\xfe\x00"), ["config.json", "not valid JSON"]),
    "endless config": (content("config.json", b"[" * 200_000), ["config.json", "not valid JSON"]),
    "unknown class": (config(architectures=["InternLM9ForCausalLM"]), ["InternLM9ForCausalLM", "not supported", "InternLM2ForCausalLM"]),
    "class of two lines": (config(architectures=["Foo\nTraceback\x1b[31m"]), ["not supported"]),
    "vocabulary too small": (config(vocab_size=4000), ["tok_embeddings", "5120", "4000"]),
    "vocabulary too large": (config(vocab_size=6000), ["tok_embeddings", "5120", "6000"]),
    "too many heads": (config(num_attention_heads=16), ["wqkv", "shape", "config.json"]),
    "heads of no group": (config(num_attention_heads=3), ["num_attention_heads=3", "multiple"]),
    "too many layers": (config(num_hidden_layers=99), ["model.layers.10", "missing"]),
    "too few layers": (config(num_hidden_layers=2), ["model.layers.2", "do not belong"]),
    "a billion layers": (config(num_hidden_layers=10**9), ["num_hidden_layers=1000000000"]),
    "huge width": (config(hidden_size=10**12), ["hidden_size=1000000000000"]),
    "tied, yet another head": (config(tie_word_embeddings=True), ["tie_word_embeddings", "output.weight"]),
    "eos of no kind": (config(eos_token_id="x"), ["eos_token_id='x'"]),
    "half a shard": (cut, [SHARD, "truncated"]),
    "a git-lfs pointer": (content(SHARD, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), [SHARD, "git lfs pull"]),
    "shard elsewhere": (shard_elsewhere, ["../../secret", "out of the model folder"]),
    "no tokenizer": (no_tokenizer, ["no tokenizer", "tokenizer.model"]),
    "broken tokenizer": (content("tokenizer.json", b'{"version"'), ["tokenizer.json"]),
    "broken template": (content("tokenizer_config.json", b'{"chat_template": "{% for %}"}'), ["tokenizer_config.json", "chat_template"]),
    "tokenizer of another model": (foreign_weights, ["tokenizer", "131 tokens"]),
    "senseless defaults": (content("generation_config.json", b'{"temperature": -3}'), ["generation_config.json", "temperature=-3"]),
}


def short_answer(pipe: Pipeline) -> bool:
    """Whether a request of three tokens is answered."""
    answer = pipe("Hi", GenerationConfig(max_new_tokens=3))
    return isinstance(answer, Response) and answer.generate_token_len == 3


def one_line(error: BaseException) -> str:
    """The text of an error; checks that it is a line that a terminal can show."""
    text = str(error)
    assert text.isprintable() and len(text) < 1500, text
    return text


@pytest.mark.parametrize("spoil, words", FOLDERS.values(), ids=FOLDERS.keys())
def test_a_spoilt_folder_is_one_line_and_leaves_no_thread(spoil: Spoil, words: list[str], folder: Path) -> None:
    spoil(folder)
    before = set(threading.enumerate())
    with pytest.raises(CheckpointError) as caught:
        pipeline(str(folder), SMALL)
    text = one_line(caught.value)
    assert all(word in text for word in words), text
    deadline = time.monotonic() + 10
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:  # closing waits for no grammar that is being compiled
        time.sleep(0.01)
    assert not left


@pytest.mark.parametrize(
    "options, words",
    [
        ({"cache_max_entry_count": 1e-9}, ["cache_max_entry_count=1e-09", "one KV block", "use at least"]),
        ({"cache_max_entry_count": 1e9}, ["cache_max_entry_count=1000000000", "use at most"]),
        ({"cache_max_entry_count": float("inf")}, ["cache_max_entry_count=inf"]),
        ({"cache_max_entry_count": float("nan")}, ["cache_max_entry_count=nan"]),
        ({"cache_max_entry_count": None}, ["cache_max_entry_count=None", "0.8"]),
        ({"cache_max_entry_count": 1.5}, ["cache_max_entry_count=1.5"]),
        ({"cpu_threads": 10**6}, ["cpu_threads=1000000", "1024"]),
        ({"session_len": 0}, ["session_len=0"]),
        # tables of five times the free memory, after a pool of a tenth of it, which is filled; by default it would be most of the machine
        ({"session_len": 1 << 31, "max_batch_size": 65536, "cache_max_entry_count": 0.1}, ["not enough memory", "bytes", "session_len"]),
        ({"session_len": 10**30}, ["session_len=1000000000000000000000000000000", "2147483648"]),
        ({"max_batch_size": 10**9}, ["max_batch_size=1000000000"]),
    ],
    ids=str,
)
def test_an_option_that_cannot_work_is_one_line(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        pipeline(None, TurbomindEngineConfig(**options))
    assert all(word in one_line(caught.value) for word in words), caught.value


def test_a_program_whose_start_failed_ends_as_any_other() -> None:
    """What the engine's thread had is freed before the error is raised; a program that ended beside it was aborted."""
    script = (
        "import lmdeploy\n"
        "try: lmdeploy.pipeline(None, lmdeploy.TurbomindEngineConfig(session_len=1 << 31, max_batch_size=65536, cache_max_entry_count=0.02))\n"
        "except ValueError as e: print(e)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and "not enough memory" in ended.stdout, ended.stdout + ended.stderr


def test_five_blocks_serve_what_they_hold_and_refuse_the_rest() -> None:
    with pipeline(None, TurbomindEngineConfig(cache_max_entry_count=5, session_len=2048)) as pipe:
        assert short_answer(pipe)
        with pytest.raises(RequestError, match="320"):
            pipe("word " * 400, GenerationConfig(max_new_tokens=3))
        assert pipe.frontend.stats().used_blocks == 0


def test_a_single_bad_prompt_or_setting_raises_and_the_pipeline_goes_on() -> None:
    with pipeline(None, SMALL) as pipe:
        settings: list[dict[str, Any]] = [
            {"stop_token_ids": [10**6]}, {"temperature": None}, {"logit_bias": [1]}, {"repetition_penalty": float("inf")}, {"n": 1000}, {"logprobs": 10**6},
        ]  # fmt: skip
        for bad in settings:
            with pytest.raises(LmdeployError) as caught:
                pipe("Hi", GenerationConfig(**bad))
            assert next(iter(bad)) in one_line(caught.value)
        prompts: list[Any] = ["", [], [[]], [-1], [5120], [True], "\ud800", "x " * 5000, [{"role": "wizard", "content": "x"}]]
        for prompt in prompts:
            try:
                answers = pipe(prompt)
            except RequestError as e:
                one_line(e)
            else:
                assert isinstance(answers, list) and [a.finish_reason for a in answers] == ["error"], prompt
        assert short_answer(pipe)
        assert pipe.frontend.stats().used_blocks == 0


def test_a_pipeline_that_nobody_closed_ends_with_its_last_reference() -> None:
    before = set(threading.enumerate())
    pipe = pipeline(None, SMALL)
    assert short_answer(pipe)
    del pipe
    gc.collect()
    assert set(threading.enumerate()) <= before


def test_twice_closed_is_closed_and_another_pipeline_goes_on() -> None:
    with pipeline(None, SMALL) as stays:
        gone = pipeline(None, SMALL)
        rest = gone.stream_infer("Tell me a story", GenerationConfig(max_new_tokens=1000, ignore_eos=True))
        next(rest)
        gone.close()
        gone.close()
        assert list(rest)[-1].finish_reason == "error"
        with pytest.raises(LmdeployError, match="closed"):
            gone("Hi")
        assert short_answer(stays)


@pytest.mark.parametrize("end, code", [("", 0), ("raise SystemExit(7)", 7), ("import os, signal; os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT)])
def test_a_program_that_ends_while_an_answer_runs_ends_cleanly(end: str, code: int) -> None:
    program = (
        "from lmdeploy import *; p = pipeline(None, TurbomindEngineConfig(cache_max_entry_count=40, max_prefill_token_num=256));"
        f"i = p.stream_infer('Hi', GenerationConfig(max_new_tokens=1000, ignore_eos=True)); next(i); {end}"
    )
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, timeout=60)
    assert done.returncode == code, done.stderr.decode()
    assert b"terminate" not in done.stderr


# ---------------------------------------------------------------- the command line


def lmdeploy(shell: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """A command line, redirections included."""
    return subprocess.run(["bash", "-c", f"{sys.executable} -m lmdeploy {shell}"], input=stdin, env=ENVIRONMENT, cwd=ROOT, capture_output=True, timeout=60)


@pytest.mark.parametrize("command", ["chat", "serve api_server --server-port 0"])
def test_a_spoilt_folder_ends_the_command_with_two_and_one_line(command: str, folder: Path) -> None:
    cut(folder)
    done = lmdeploy(f"{command.split(' --')[0]} {folder}" + (" --" + command.split(" --")[1] if " --" in command else ""))
    assert done.returncode == 2
    [line] = (line for line in done.stderr.decode().splitlines() if " - WARNING - " not in line)  # of kernels that this processor lacks
    assert line.startswith("lmdeploy: error:") and SHARD in line


def test_a_template_file_that_is_no_text_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(b"\xff")
    done = lmdeploy(f"chat --chat-template {tmp_path / 't.json'}")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert b"t.json is not valid JSON" in done.stderr


@pytest.mark.parametrize("closed", ["<&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams_do_not_break_a_chat(closed: str) -> None:
    done = lmdeploy(f"chat --max-new-tokens 3 {closed}", b"Hi\n\n")
    assert done.returncode == 0
    assert b"error" not in done.stderr and b"Traceback" not in done.stderr
    assert bool(done.stdout.strip()) == (closed == "2>&-")


def test_a_full_disk_is_told_in_a_line() -> None:
    done = lmdeploy("chat --max-new-tokens 3 >/dev/full", b"Hi\n\n")
    assert done.returncode == 2
    assert done.stderr.decode().splitlines()[-1].startswith("lmdeploy: error: the output cannot be written")


# ---------------------------------------------------------------- the server


class Server:
    """`lmdeploy serve api_server` as a user starts it, with its log in a file."""

    def __init__(self, log: Path) -> None:
        self.log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "lmdeploy", "serve", "api_server", "--server-name", "127.0.0.1", "--server-port", str(self.port)]
        with log.open("wb") as out:
            self.process = psutil.Popen(command, env=ENVIRONMENT, stdout=out, stderr=out)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30, trust_env=False)
        self._wait()
        self.body = {"model": self.http.get("/v1/models").json()["data"][0]["id"], "messages": [{"role": "user", "content": "Tell me a story"}]}
        self.long = {**self.body, "max_tokens": 1500, "ignore_eos": True, "stream": True}

    def _wait(self) -> None:
        deadline = time.monotonic() + 40
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            try:
                if self.http.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def send(self, body: dict[str, Any], length: int | None = None) -> socket.socket:
        """A request on a socket of its own, `length` bytes of its body."""
        raw = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        data = json.dumps(body).encode()
        raw.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data) + data[:length]
        )
        return raw

    def gauge(self, name: str) -> float:
        """A figure of /metrics."""
        return next(float(line.split()[-1]) for line in self.http.get("/metrics").text.splitlines() if line.startswith(f"lmdeploy:{name}{{"))

    def until_idle(self) -> None:
        """Nothing runs, waits or holds a block; fails when that takes long."""
        names = ("num_requests_running", "num_requests_waiting", "kv_blocks_used")
        deadline = time.monotonic() + 10
        while any(left := [self.gauge(name) for name in names]):
            assert time.monotonic() < deadline, dict(zip(names, left, strict=True))
            time.sleep(0.05)

    def answers(self) -> bool:
        """Whether a short request is served."""
        return self.http.post("/v1/chat/completions", json={**self.body, "max_tokens": 3}).status_code == 200


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("server") / "log")
    yield running
    running.http.close()
    if running.process.poll() is None:
        running.process.kill()
        running.process.wait()


def test_a_hundred_clients_that_vanish_leave_nothing_behind(server: Server) -> None:
    clients = [server.send(server.long) for _ in range(50)]
    clients[0].recv(100)
    clients += [server.send(server.long) for _ in range(50)]
    for number, client in enumerate(clients):
        if number % 2:  # half of them with a reset instead of a farewell
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.close()
    server.until_idle()
    assert server.answers()


def test_clients_that_leave_within_their_request_are_no_fault_of_the_server(server: Server) -> None:
    for _ in range(20):
        server.send(server.body, length=4).close()
    assert server.answers()
    assert "Traceback" not in server.log.read_text()


def test_a_client_that_stops_reading_stops_nobody_else(server: Server) -> None:
    with server.send({**server.long, "n": 8, "logprobs": True, "top_logprobs": 20}) as stalled:
        stalled.recv(100)
        time.sleep(1)
        assert server.answers()
    server.until_idle()


def test_a_used_port_is_told_before_a_model_is_loaded(server: Server) -> None:
    start = time.monotonic()
    done = lmdeploy(f"serve api_server --server-name 127.0.0.1 --server-port {server.port}")
    assert done.returncode == 2 and f"port {server.port}" in done.stderr.decode() and "in use" in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1 and time.monotonic() - start < 20


def test_a_killed_engine_ends_its_answers_is_told_and_replaced(server: Server) -> None:
    [engine] = server.process.children(recursive=True)
    with server.http.stream("POST", "/v1/chat/completions", json=server.long) as reply:
        lines = reply.iter_lines()
        next(lines)
        engine.kill()
        events = [line for line in lines if line]
    assert "killed by signal 9" in events[-2] and events[-1] == "data: [DONE]"
    deadline = time.monotonic() + 60
    while (reply := server.http.post("/v1/chat/completions", json=server.body)).status_code != 200:
        assert reply.status_code == 503 and reply.headers["retry-after"] and "killed by signal 9" in reply.json()["error"]["message"]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert server.process.children(recursive=True) != [engine]
    server.process.terminate()
    assert server.process.wait(20) == 0
    assert "Traceback" not in server.log.read_text()
