"""A model that sees, used as people do: the Python API, the server through the OpenAI client, a Gradio page of one's own; and what goes wrong."""

from __future__ import annotations

import base64
import functools
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from anthropic import Anthropic
from openai import BadRequestError, OpenAI
from PIL import Image

from lmdeploy import GenerationConfig, Pipeline, PytorchEngineConfig, TurbomindEngineConfig, pipeline
from lmdeploy.errors import RequestError
from lmdeploy.frontend import Frontend
from lmdeploy.lite import auto_awq
from lmdeploy.serving.options import ServerConfig
from lmdeploy.spec import read_json_object
from lmdeploy.vl import load_image
from tests.parity.test_vision_parity import picture
from tests.serving.running import RunningServer
from tests.vision.folders import write

GREEDY = GenerationConfig(max_new_tokens=8, do_sample=False, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-1.6: pictures take different numbers of tokens."""
    folder = tmp_path_factory.mktemp("models") / "llava-v1.6"
    write("llava 1.6", folder)
    return folder


@pytest.fixture(scope="module")
def pipe(folder: Path) -> Iterator[Pipeline]:
    config = TurbomindEngineConfig(
        dtype="float32", session_len=160, cache_max_entry_count=60, cache_block_seq_len=8, max_batch_size=4, max_prefill_token_num=48
    )
    with pipeline(str(folder), backend_config=config) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    media = tmp_path_factory.mktemp("media")
    picture(40, 30).save(media / "cat.png")
    config = PytorchEngineConfig(dtype="float32", cache_max_entry_count=100, cpu_threads=1)
    with Frontend.open(str(folder), config, separate_process=True) as frontend:
        running = RunningServer(frontend, ServerConfig(server_port=0, model_name="eyes", allowed_media_path=str(media)))
        yield running
        running.stop()


def data_url(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def test_every_way_to_give_a_picture_gives_the_same_answer(pipe: Pipeline, tmp_path: Path) -> None:
    image = picture(40, 30)
    image.save(tmp_path / "cat.png")
    prompts: list[Any] = [
        ("describe this image", image),
        (image, "describe this image"),
        ("describe this image", [image]),
        ("describe this image", str(tmp_path / "cat.png")),
        ("describe this image", load_image(str(tmp_path / "cat.png"))),
        [{"role": "user", "content": [{"type": "text", "text": "describe this image"}, {"type": "image_url", "image_url": {"url": data_url(image)}}]}],
        [{"role": "user", "content": [{"type": "image_data", "image_data": {"data": image}}, {"type": "text", "text": "<IMAGE_TOKEN>\ndescribe this image"}]}],
    ]
    answers = {pipe(prompt, gen_config=GREEDY).text for prompt in prompts}  # type: ignore[union-attr]
    assert len(answers) == 1
    batch = pipe([prompts[0], prompts[3]], gen_config=GREEDY)
    assert isinstance(batch, list) and {r.text for r in batch} == answers


def test_other_pictures_give_other_answers_whatever_is_cached(pipe: Pipeline) -> None:
    """Equal prompts with pictures of equal size: only the pixels differ, so a prefix cache that looked at token ids would serve the wrong keys."""
    alone = [pipe(("describe this image", picture(56, 56, seed)), gen_config=GREEDY) for seed in range(4)]
    again = pipe([("describe this image", picture(56, 56, seed)) for seed in (3, 1, 0, 2)], gen_config=GREEDY)
    assert isinstance(again, list)
    texts = [r.text for r in alone]  # type: ignore[union-attr]
    assert len(set(texts)) == 4
    assert [r.text for r in again] == [texts[i] for i in (3, 1, 0, 2)]
    assert all(r.cached_tokens >= 48 for r in again), "equal pictures are found in the cache"


def test_more_conversations_than_fit_are_computed_again_with_their_pictures(pipe: Pipeline) -> None:
    long = GenerationConfig(max_new_tokens=60, do_sample=False, ignore_eos=True)
    prompts = [("what is it?", picture(56, 28, seed)) for seed in range(8)]
    alone = [pipe(prompt, gen_config=long) for prompt in prompts]
    before = pipe.frontend.stats().preemptions
    together = pipe(prompts, gen_config=long)
    assert [r.text for r in together] == [r.text for r in alone]  # type: ignore[union-attr]
    assert pipe.frontend.stats().preemptions > before


def test_a_picture_that_overflows_the_session_is_told_with_its_tokens(pipe: Pipeline) -> None:
    """Row A18: never an empty answer."""
    with pytest.raises(RequestError) as caught:
        pipe(("describe this image", [picture(800, 800), picture(500, 500)]), gen_config=GREEDY)
    message = str(caught.value)
    assert caught.value.code == "context_length_exceeded"
    assert "session_len) is 160" in message and "2 pictures" in message and "800x800: 88" in message and "smaller or fewer pictures" in message
    answer = pipe([("describe this image", [picture(800, 800)] * 2), ("hello", picture(20, 20))], gen_config=GREEDY)
    assert isinstance(answer, list)
    assert answer[0].finish_reason == "error" and "session_len" in str(answer[0].error_message)
    assert answer[1].text


def test_text_alone_needs_no_picture_and_a_picture_needs_eyes(pipe: Pipeline, model_folder: Path) -> None:
    assert pipe("hello", gen_config=GREEDY).text  # type: ignore[union-attr]
    with (
        pipeline(str(model_folder), backend_config=TurbomindEngineConfig(cache_max_entry_count=20, max_batch_size=2)) as blind,
        pytest.raises(RequestError, match="reads text only"),
    ):
        blind(("describe this image", picture(10, 10)))


@pytest.mark.parametrize(
    "prompt, words",
    [
        (("x", "/no/such/file.png"), "cannot be read"),
        (("x", "http://127.0.0.1/a.png"), "private address"),
        (("x", 5), "int"),
        ((1, 2), "with pictures"),
        (("x",), "with pictures"),
        (("x", [picture(8, 8)] * 17), "more than 16"),
    ],
)
def test_pictures_that_cannot_be_had_are_named(pipe: Pipeline, prompt: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        pipe(prompt, gen_config=GREEDY)


def test_the_openai_client_sends_pictures(server: RunningServer) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert client.models.list().data[0].input_modalities == ["text", "image"]  # type: ignore[attr-defined]

    def ask(url: str) -> tuple[str, int]:
        parts: Any = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": url, "detail": "low"}}]
        answer = client.chat.completions.create(
            model="eyes", messages=[{"role": "user", "content": parts}], temperature=0, max_tokens=6, extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        return str(answer.choices[0].message.content), answer.usage.prompt_tokens

    first = ask(data_url(picture(40, 30)))
    assert first == ask("cat.png") == ask("file://cat.png")
    other = ask(data_url(picture(90, 20, 1)))
    assert other[0] != first[0] and other[1] != first[1]


def test_anthropics_client_and_responses_send_pictures_too(server: RunningServer) -> None:
    image = picture(40, 30)
    url = data_url(image)
    chat = {"model": "eyes", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What is this?"}]}]}
    count = server.http.post("/v1/chat/completions", json={**chat, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    source: Any = {"type": "base64", "media_type": "image/png", "data": url.partition(",")[2]}
    claude = Anthropic(base_url=server.url, api_key="none")
    content: Any = [{"type": "image", "source": source}, {"type": "text", "text": "What is this?"}]
    message = claude.messages.create(model="eyes", max_tokens=4, messages=[{"role": "user", "content": content}])
    assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) == count
    parts: Any = [{"role": "user", "content": [{"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "input_text", "text": "What is this?"}]}]
    response = OpenAI(base_url=f"{server.url}/v1", api_key="none").responses.create(model="eyes", input=parts, max_output_tokens=4)
    assert response.usage is not None and response.usage.input_tokens == count


@pytest.mark.parametrize(
    "url, words",
    [
        ("data:image/png;base64,AAAA", "no picture"),
        ("/etc/passwd", "below the allowed media path"),
        ("../secret.png", "below the allowed media path"),
        ("http://169.254.169.254/latest/meta-data", "private address"),
        ("gopher://example.com/", "below the allowed media path"),
    ],
)
def test_the_server_refuses_pictures_in_one_line(server: RunningServer, url: str, words: str) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(BadRequestError, match=words) as caught:
        client.chat.completions.create(model="eyes", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}])
    assert caught.value.code == "media_refused"
    assert str(caught.value.param).startswith("messages.0.content.0")
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_local_web_server_is_not_reached_through_ours(server: RunningServer, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"x")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    asked: list[str] = []

    class Inner(http.server.ThreadingHTTPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            asked.append(str(client_address))
            super().process_request(request, client_address)

    with Inner(("127.0.0.1", 0), handler) as inner:
        threading.Thread(target=inner.serve_forever, daemon=True).start()
        body = {
            "model": "eyes",
            "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": f"http://localhost:{inner.server_port}/secret.png"}]}],
        }
        assert server.http.post("/v1/chat/completions", json=body).status_code == 400
        inner.shutdown()
    assert asked == []


def test_a_gradio_interface_of_ones_own(pipe: Pipeline, tmp_path: Path) -> None:
    """Row A18: the seeds' page around `pipe((text, image))`, asked through its API by the real client."""
    gr = pytest.importorskip("gradio")
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    def model(image: Image.Image | None, text: str) -> list[dict[str, str]]:
        if image is None:
            return [{"role": "assistant", "content": "no picture"}]
        return [{"role": "user", "content": text}, {"role": "assistant", "content": pipe((text, image), gen_config=GREEDY).text}]  # type: ignore[union-attr]

    demo = gr.Interface(fn=model, inputs=[gr.Image(type="pil"), gr.Textbox()], outputs=gr.Chatbot())
    _, url, _ = demo.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True, show_error=True)
    picture(40, 30).save(tmp_path / "small.png")
    picture(900, 900).save(tmp_path / "large.png")
    try:
        client = Client(url, verbose=False)
        shown = client.predict(handle_file(str(tmp_path / "small.png")), "introduce this image", fn_index=0)
        expected = pipe(("introduce this image", picture(40, 30)), gen_config=GREEDY).text  # type: ignore[union-attr]
        assert expected and expected.strip()[:5] in str(shown)
        with pytest.raises(AppError, match=r"88\), but the context length \(session_len\) is 160"):
            client.predict(handle_file(str(tmp_path / "large.png")), "what is it? " * 40, fn_index=0)
    finally:
        demo.close()


def test_a_quantised_folder_still_sees(tmp_path: Path) -> None:
    """Row A19: InternVL2's language model in 4 bits, the vision tower as it was."""
    folder = tmp_path / "internvl2"
    write("internvl", folder)
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a small fox who liked to count. " * 200)
    auto_awq(str(folder), work_dir=str(tmp_path / "4bit"), calib_dataset=str(text), calib_samples=2, calib_seqlen=32, w_group_size=16, eval_tokens=0)
    assert read_json_object(tmp_path / "4bit" / "config.json")["quantization_config"]["quant_method"] == "awq"
    config = TurbomindEngineConfig(dtype="float32", session_len=256, cache_max_entry_count=60, max_batch_size=2)
    with pipeline(str(tmp_path / "4bit"), backend_config=config) as quantised:
        answers = quantised([("describe this image", picture(56, 56, seed)) for seed in range(3)], gen_config=GREEDY)
    assert isinstance(answers, list)
    assert len({r.text for r in answers}) == 3
