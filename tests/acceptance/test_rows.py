"""Rows of the acceptance list, each end to end as a user does it: commands in a real terminal, a real server, the users' own scripts."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pexpect
import psutil
import pytest
from openai import OpenAI

from lmdeploy import GenerationConfig, TurbomindEngineConfig, pipeline
from lmdeploy.errors import ConfigError
from lmdeploy.pipeline import Pipeline
from tests.acceptance.commands import ENVIRONMENT, ROOT, Server, free_port

PROMPT = "double enter to end input >>> "
TWENTY = ", ".join(map(str, range(1, 21)))
SMALL_STEPS = ["--max-prefill-token-num", "256"]  # the largest step is a third of the time of a start; not for rows that measure memory


def terminal(*arguments: str) -> pexpect.spawn:
    """The command in a real pseudo-terminal."""
    return pexpect.spawn(sys.executable, ["-m", "lmdeploy", *arguments], env=ENVIRONMENT, encoding="utf-8", timeout=60, dimensions=(40, 160))


def ask(child: pexpect.spawn, text: str) -> str:
    """Type a message, Enter twice, and return what was answered before the next prompt."""
    child.send(text + "\r\r")
    child.expect_exact(PROMPT)
    return plain(child.before)


def plain(text: str) -> str:
    """Without escape sequences and line wrapping."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r", "", text)


def mebibytes(text: str, line: str) -> float:
    """The size in a line of the memory bill, in MiB."""
    match = re.search(rf"^\W*{line}.*?([\d.,]+) (MiB|GiB|MB|GB|KiB)", text, re.MULTILINE | re.IGNORECASE)
    assert match, f"no line '{line}' in\n{text}"
    scale = {"KiB": 1 / 1024, "MiB": 1, "GiB": 1024, "MB": 1e6 / 2**20, "GB": 1e9 / 2**20}[match[2]]
    return float(match[1].replace(",", "")) * scale


# ---------------------------------------------------------------- A1, A2, A3: the terminal


def test_a1_chat_streams_remembers_stops_and_starts_anew(model_folder: Path) -> None:
    child = terminal("chat", str(model_folder), "--cache-max-entry-count", "200", "--temperature", "0")
    child.expect_exact(PROMPT)
    assert "weights" in child.before.lower() and "kv" in child.before.lower(), "the memory bill is printed"
    assert TWENTY in ask(child, "Count from 1 to 20.").replace("\n", " ").replace("  ", " ")
    ask(child, "My name is Ann.")
    assert "Ann" in ask(child, "What is my name?"), "the conversation is kept"
    child.send("end\r\r")
    child.expect_exact(PROMPT)
    assert "Ann" not in ask(child, "What is my name?"), "`end` starts anew"
    child.send("exit\r\r")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a1_ctrl_c_stops_the_answer_and_not_the_program(model_folder: Path) -> None:
    child = terminal("chat", str(model_folder), "--cache-max-entry-count", "200")
    child.expect_exact(PROMPT)
    child.send("Tell me a long story about a king, a fox and a dragon.\r\r")
    child.expect_exact("dragon.")  # the question as it is shown; Ctrl-C while it is still being read leaves the program
    child.expect(r"[A-Za-z]{3,} [a-z]+ [a-z]+")
    child.sendintr()
    child.expect_exact(PROMPT)
    assert "1, 2, 3, 4, 5" in ask(child, "Count from 1 to 5.")
    child.send("exit\r\r")
    child.expect(pexpect.EOF)


def test_a2_both_backends_give_the_same_greedy_answer(model_folder: Path) -> None:
    answers = []
    for backend in ("pytorch", "turbomind"):
        command = [
            sys.executable,
            "-m",
            "lmdeploy",
            "chat",
            str(model_folder),
            "--backend",
            backend,
            "--dtype",
            "float32",
            "--temperature",
            "0",
            "--max-new-tokens",
            "60",
        ]
        run = subprocess.run(
            [*command, "--cache-max-entry-count", "100", *SMALL_STEPS],
            input="Tell me a story about a cat.\n\n",
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert run.returncode == 0, run.stderr
        answers.append(next(line for line in run.stdout.splitlines() if len(line.split()) > 20))
    assert answers[0] == answers[1]


def test_a3_the_pool_takes_its_share_and_the_bill_is_true(model_folder: Path) -> None:
    ratio = 0.04
    child = terminal("chat", str(model_folder), "--cache-max-entry-count", str(ratio))
    child.expect_exact(PROMPT)
    bill = plain(child.before)
    rss = psutil.Process(child.pid).memory_info().rss / 2**20
    weights, kv, total, free = (mebibytes(bill, name) for name in ("weights", "kv", "total", "free"))
    parts = weights + kv + mebibytes(bill, r"(?:step )?workspace") + mebibytes(bill, "other")
    assert parts == pytest.approx(total, rel=0.02)
    assert rss == pytest.approx(total, rel=0.02)
    assert kv / (kv + free) == pytest.approx(ratio, rel=0.15), "free memory moves a little while we look"
    ask(child, "Count from 1 to 20.")
    assert psutil.Process(child.pid).memory_info().rss / 2**20 == pytest.approx(total, rel=0.02), "and stays true after an answer"
    child.send("exit\r\r")
    child.expect(pexpect.EOF)


# ---------------------------------------------------------------- A4, A10: 4-bit weights, quantised KV cache


def test_a4_the_quantised_model_answers_in_the_terminal(four_bit_folder: Path) -> None:
    flags = ["--model-format", "awq", "--cache-max-entry-count", "0.01", "--backend", "turbomind", "--temperature", "0"]
    child = terminal("chat", str(four_bit_folder), *flags)
    child.expect_exact(PROMPT)
    assert TWENTY in ask(child, "Count from 1 to 20.").replace("\n", " ").replace("  ", " ")
    child.send("exit\r\r")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0


def test_a10_the_same_bytes_hold_more_tokens_and_the_report_says_how_many(model_folder: Path) -> None:
    tokens: dict[str, int] = {}
    sizes: dict[str, float] = {}
    for policy, report in (("0", ""), ("8", "int8: 1.88 times"), ("4", "rotated int4: 3.56 times")):
        child = terminal("chat", str(model_folder), "--quant-policy", policy, "--cache-max-entry-count", "0.01", "--temperature", "0", *SMALL_STEPS)
        child.expect_exact(PROMPT)
        text = plain(child.before)
        found = re.search(r"blocks of \d+ = (\d+) tokens", text)
        assert found and report in text, text
        assert ("quality" in text and "mean KL" in text) == (policy == "4"), "a 4-bit cache is measured at start-up"
        tokens[policy], sizes[policy] = int(found[1]), mebibytes(text, "KV cache {5}")
        assert TWENTY in ask(child, "Count from 1 to 20.").replace("\n", " ").replace("  ", " ")
        child.send("exit\r\r")
        child.expect(pexpect.EOF)
    for policy, times in (("8", 128 / 68), ("4", 128 / 36)):
        assert tokens[policy] / sizes[policy] == pytest.approx(times * tokens["0"] / sizes["0"], rel=0.01)


def test_a10_plain_int4_can_be_compared_and_mistakes_are_one_line(model_folder: Path) -> None:
    base = [sys.executable, "-m", "lmdeploy", "chat", str(model_folder), "--cache-max-entry-count", "50", *SMALL_STEPS]
    for flags, code, parts in (
        (["--quant-policy", "4", "--kv-rotation", "False"], 0, ["KV cache int4: perplexity", "(int4: 3.56 times"]),
        (["--quant-policy", "k8v4", "--strict-quality"], 0, ["KV cache rotated k8v4: perplexity", "(rotated k8v4: 2.46 times"]),
        (["--quant-policy", "fp8", "--device", "cpu"], 2, ["needs a CUDA device of compute capability 8.9", "quant_policy=8"]),
        (["--quant-policy", "turbo_quant"], 2, ["quant_policy=42", "k8v4"]),
    ):
        ran = subprocess.run([*base, *flags], input="exit\n\n", env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
        assert ran.returncode == code and "Traceback" not in ran.stderr, ran.stderr
        for part in parts:
            assert part in ran.stdout + ran.stderr


# ---------------------------------------------------------------- A5, A6, A7, A13: the server


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ["--model-format", "hf", "--quant-policy", "0", "--server-name", "0.0.0.0", "--tp", "1"]
    flags += ["--model-name", "internlm2_1_8b_chat", "--backend", "turbomind", "--cache-max-entry-count", "400"]
    started = Server(tmp_path_factory.mktemp("server") / "log", str(model_folder), *flags)
    yield started
    started.stop()


def test_a5_the_server_shows_swagger_and_prints_its_url(server: Server) -> None:
    page = httpx.get(server.url + "/")
    assert page.status_code == 200
    assert "swagger" in page.text.lower()
    assert str(server.port) in server.log.read_text()


def body(**changes: object) -> dict[str, object]:
    """The request of the users' Swagger page, field by field."""
    fields: dict[str, object] = {
        "model": "internlm2_1_8b_chat",
        "messages": [{"content": "Tell me a story about a cat and a mouse.", "role": "user"}],
        "temperature": 0.8,
        "top_p": 0.8,
        "n": 1,
        "max_tokens": 150,
        "stop": None,
        "stream": False,
        "presence_penalty": 0,
        "frequency_penalty": 0,
        "user": "string",
        "repetition_penalty": 1,
        "session_id": -1,
        "ignore_eos": False,
        "skip_special_tokens": True,
        "top_k": 40,
        "seed": 5,
    }
    return {**fields, **changes}


def content(server: Server, **changes: object) -> str:
    reply = httpx.post(server.url + "/v1/chat/completions", json=body(**changes), timeout=60)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def test_a6_every_sampling_field_changes_the_output(server: Server) -> None:
    assert httpx.get(server.url + "/v1/models").json()["data"][0]["id"] == "internlm2_1_8b_chat"
    plain_text = content(server)
    assert content(server) == plain_text, "a seeded request repeats"
    changes = [
        {"repetition_penalty": 2},
        {"presence_penalty": 2},
        {"frequency_penalty": 2},
        {"temperature": 2, "top_p": 1},
        {"top_k": 1},
        {"top_p": 0.01},
        {"seed": 6},
    ]
    for change in changes:
        assert content(server, **change) != plain_text, change
    greedy = content(server, top_k=1, max_tokens=None)
    assert len(greedy) > len(content(server, top_k=1, max_tokens=20)), "max_tokens: null means as long as it likes"
    word = greedy.split()[5]
    assert word not in content(server, top_k=1, stop=word)
    ask_five = [{"role": "user", "content": "Count from 1 to 5."}]
    assert len(content(server, messages=ask_five, ignore_eos=True)) > len(content(server, messages=ask_five))
    shown = content(server, messages=ask_five, ignore_eos=True, skip_special_tokens=False, logit_bias={"5119": 100}, top_k=1, max_tokens=3)
    assert "<|im_start|>" in shown


def test_a7_api_client_is_the_same_conversation_over_http(server: Server) -> None:
    child = terminal("serve", "api_client", server.url)
    child.expect_exact(PROMPT)
    assert TWENTY in ask(child, "Count from 1 to 20.").replace("\n", " ").replace("  ", " ")
    child.send("exit\r\r")
    child.expect(pexpect.EOF)


def test_a13_the_openai_script_gets_an_answer_and_the_log_shows_both_requests(server: Server) -> None:
    """The script as it is, on 16-bit weights."""
    script = ROOT / "examples" / "openai_client.py"
    run = subprocess.run([sys.executable, str(script), server.url + "/v1"], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.strip()) > 5
    log = server.log.read_text()
    assert re.search(r"GET /v1/models.* 200", log)
    assert re.search(r"POST /v1/chat/completions.* 200", log)
    assert "狐狸" not in log, "prompts are not logged"


def test_a13_the_script_on_four_bit_weights_and_a_four_bit_cache(four_bit_folder: Path, tmp_path: Path) -> None:
    """All of the row's server options: 4-bit weights, 4-bit KV cache."""
    flags = ["--model-format", "awq", "--quant-policy", "4", "--cache-max-entry-count", "0.01", "--server-name", "0.0.0.0", "--tp", "1"]
    server = Server(tmp_path / "log", str(four_bit_folder), *flags)
    try:
        script = ROOT / "examples" / "openai_client.py"
        run = subprocess.run([sys.executable, str(script), server.url + "/v1"], capture_output=True, text=True, timeout=60, env=ENVIRONMENT)
        assert run.returncode == 0, run.stderr
        assert len(run.stdout.strip()) > 5
    finally:
        server.stop()
    log = server.log.read_text()
    assert "rotated int4: 3.56 times" in log and "mean KL" in log, "the start-up report names the cache's format and what it costs"
    assert re.search(r"GET /v1/models.* 200", log) and re.search(r"POST /v1/chat/completions.* 200", log)


def test_a13_openai_client_streams(server: Server) -> None:
    client = OpenAI(api_key="none", base_url=server.url + "/v1")
    chunks = list(
        client.chat.completions.create(model="internlm2_1_8b_chat", messages=[{"role": "user", "content": "Count from 1 to 20."}], temperature=0, stream=True)
    )
    assert TWENTY in "".join(c.choices[0].delta.content or "" for c in chunks)
    assert len(chunks) > 10


# ---------------------------------------------------------------- A15, A16, A20: the users' Python


def test_a15_the_batch_script_runs(model_folder: Path) -> None:
    script = ROOT / "examples" / "pipeline_batch.py"
    run = subprocess.run([sys.executable, str(script), str(model_folder)], capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("finish_reason: stop") + run.stdout.count("finish_reason: length") == 2
    assert [line for line in run.stdout.splitlines() if line.startswith("session_id")] == ["session_id: 0", "session_id: 1"]


def test_a16_stream_infer_yields_increments(pipe: Pipeline) -> None:
    conversation = [{"role": "user", "content": "Count from 1 to 20."}]
    parts = [r.text for r in pipe.stream_infer(prompts=conversation, gen_config=GenerationConfig(), do_preprocess=True, adapter_name=None)]
    assert TWENTY in "".join(parts)
    assert len(parts) > 10


def test_a20_a_gradio_demo_serves_concurrent_users(pipe: Pipeline) -> None:
    gradio_client = pytest.importorskip("gradio_client", reason="the demo needs gradio (extra `ui`)")
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from web_demo import build, text_of
    finally:
        sys.path.pop(0)
    page = build(pipe).queue(max_size=100, default_concurrency_limit=8)
    _, url, _ = page.launch(server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True, quiet=True)
    try:

        def visitor(name: str) -> str:
            client = gradio_client.Client(url, verbose=False)
            history = client.predict(f"My name is {name}.", [], 200, 0.8, 1, 0.8, api_name="/chat")
            history = client.predict("What is my name?", history, 200, 0.8, 1, 0.8, api_name="/chat")
            assert [m["role"] for m in history] == ["user", "assistant"] * 2
            return text_of(history[-1]["content"])

        names = ["Ann", "Tom", "Mia", "Ben"]
        with ThreadPoolExecutor(4) as pool:
            for name, answer in zip(names, pool.map(visitor, names), strict=True):
                assert name in answer, "every visitor has a history of their own"
    finally:
        page.close()


# ---------------------------------------------------------------- A21, A22: limits


def test_a22_a_tiny_ratio_works_or_says_so_before_any_request(model_folder: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "lmdeploy", "chat", str(model_folder), "--cache-max-entry-count", "0.001"],
        input="Count from 1 to 20.\n\n",
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode == 0 and TWENTY in run.stdout) or (run.returncode != 0 and "cache_max_entry_count" in run.stderr), run.stderr
    with pytest.raises(ConfigError, match="cache_max_entry_count"):
        pipeline(str(model_folder), backend_config=TurbomindEngineConfig(cache_max_entry_count=1e-9))


def loss_by_position(model_folder: Path, ids: list[int], **options: object) -> list[float]:
    """Mean cross-entropy of each quarter of a long text."""
    with pipeline(
        str(model_folder), backend_config=TurbomindEngineConfig(session_len=len(ids), cache_max_entry_count=len(ids) // 64 + 2, max_batch_size=1, **options)
    ) as long:
        scored = long.frontend.generate(long.frontend.prepare_score(ids, GenerationConfig(prompt_logprobs=0)))[0]
    losses = [-next(iter(entry.values())) for entry in scored.prompt_logprobs or () if entry]
    quarter = len(ids) // 4
    return [sum(losses[i : i + quarter]) / len(losses[i : i + quarter]) for i in range(0, quarter * 4 - 1, quarter)]


def test_a21_dynamic_ntk_stays_coherent_beyond_the_training_length(pipe: Pipeline, model_folder: Path) -> None:
    animals = ["cat", "dog", "fox", "bear", "bird", "fish", "mouse", "horse", "rabbit"]
    asked = [f"Tell me a story about a {a} and a {b}." for a in animals for b in animals if a < b]
    told = pipe(asked, GenerationConfig(max_new_tokens=200, temperature=1.0, random_seed=1), use_tqdm=False)
    ids = pipe.tokenizer.encode("\n\n".join(answer.text for answer in told))[:4096]
    assert len(ids) == 4096, "twice the training length of 2048"
    plain_loss = loss_by_position(model_folder, ids)
    scaled = loss_by_position(model_folder, ids, rope_scaling_factor=4.0)
    assert max(plain_loss[2:]) > plain_loss[0] + 1, "the unscaled model falls apart"
    assert max(scaled) < scaled[0] + 0.5, "the scaled one does not"
    with_logn = loss_by_position(model_folder, ids, rope_scaling_factor=4.0, use_logn_attn=True)
    assert with_logn != scaled and max(with_logn) < scaled[0] + 0.5
