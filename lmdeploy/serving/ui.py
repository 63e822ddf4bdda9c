"""The web page: a gradio Blocks over `ui_chat`. Needs gradio (extra `ui`).

Everything a visitor says lives in the `gr.State` of their own tab; the page itself keeps nothing. Handlers are coroutines, so an answer
holds no thread, and Stop or a closed tab ends it at once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from lmdeploy.errors import LmdeployError
from lmdeploy.serving import ui_chat
from lmdeploy.serving.ui_chat import ChatServer, Exchange, ModelCard, Settings

STATIC = Path(__file__).parent / "static"
#: answers that are streamed at a time; more visitors wait, this many again at most
QUEUE = 100
#: most earlier exchanges that are sent with a question
MAX_MEMORY = 50
#: a slider: least, most, default, step
SLIDERS = {
    "max_new_tokens": ("Maximum new tokens", 1, 2048, 512, 1),
    "top_p": ("Top_p", 0.01, 1, 0.8, 0.01),
    "top_k": ("Top_k", 1, 100, 40, 1),
    "temperature": ("Temperature", 0.01, 1.5, 0.7, 0.01),
    "memory": ("Past turns sent", 0, MAX_MEMORY, MAX_MEMORY, 1),
}
_SYSTEM_FONTS = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Noto Sans CJK SC", "sans-serif"]
_MONO_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Noto Sans Mono", "DejaVu Sans Mono", "monospace"]
_PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
#: how models write formulas
LATEX: list[dict[str, str | bool]] = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]


@dataclass(frozen=True, slots=True)
class Parts:
    """The components that handlers fill."""

    chat: Any
    box: Any
    retry: Any
    undo: Any
    clear: Any

    def all(self) -> list[Any]:
        """In the order of `_picture`."""
        return [self.chat, self.box, self.retry, self.undo, self.clear]


def theme() -> Any:
    """Calm colours, fonts of the reader's own system."""
    return gr.themes.Base(primary_hue="indigo", neutral_hue="slate", radius_size="lg", font=_SYSTEM_FONTS, font_mono=_MONO_FONTS).set(
        body_background_fill="*neutral_50",
        body_background_fill_dark="*neutral_950",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
    )


def css() -> str:
    """The page's own rules."""
    return (STATIC / "ui.css").read_text(encoding="utf-8")


def script() -> str:
    """The page's own few lines of JavaScript."""
    return (STATIC / "ui.js").read_text(encoding="utf-8")


def build_page(server: ChatServer, title: str = "lmdeploy") -> Any:
    """The page (a gradio Blocks) of a server, which need not be up yet."""
    with gr.Blocks(title=title, analytics_enabled=False, fill_height=True, fill_width=True, delete_cache=(3600, 3600)) as page:
        exchanges, cards = gr.State([]), gr.State([])
        with gr.Sidebar(elem_id="lm-side", width=320):
            settings = _settings()
        with gr.Column(elem_id="lm-main"):
            with gr.Row(elem_id="lm-head"):
                head = gr.Markdown(_head(None, server.url), elem_id="lm-title")
                gr.Button("◐", elem_id="lm-dark", scale=0, min_width=40)  # its work is done by ui.js
            parts = _conversation()
        _connect(page, server, parts, settings, exchanges, cards, head)
    return page


def _settings() -> list[Any]:
    """Model picker, system prompt, sliders: in the order of `_read`."""
    gr.Markdown("### Settings", elem_id="lm-settings")
    picker = gr.Dropdown([], label="Model", interactive=True, elem_id="lm-model", allow_custom_value=False)
    system = gr.Textbox(
        label="System prompt", lines=3, max_lines=10, placeholder="What the model should be; empty: its own default", max_length=1 << 16, elem_id="lm-system"
    )
    sliders = [
        gr.Slider(low, high, default, step=step, label=label, elem_id=f"lm-{name.replace('_', '-')}")
        for name, (label, low, high, default, step) in SLIDERS.items()
    ]
    return [picker, system, *sliders]


def _conversation() -> Parts:
    chat = gr.Chatbot(
        elem_id="lm-chat",
        show_label=False,
        container=False,
        scale=1,
        layout="bubble",
        buttons=["copy"],
        feedback_options=None,
        latex_delimiters=LATEX,
        placeholder="<div class='lm-empty'><b>Ask something</b><br>Enter sends, Shift+Enter begins a new line.</div>",
    )
    box = gr.MultimodalTextbox(
        elem_id="lm-box",
        show_label=False,
        container=False,
        sources=[],
        file_types=["image"],
        file_count="multiple",
        max_lines=12,
        max_plain_text_length=ui_chat.MAX_QUESTION,
        placeholder="Message",
        autofocus=True,
        submit_btn=True,
        stop_btn=False,
    )
    with gr.Row(elem_id="lm-buttons"):
        retry, undo, clear = (gr.Button(text, size="sm", min_width=80, interactive=False, elem_id=f"lm-{text.lower()}") for text in ("Retry", "Undo", "Clear"))
    return Parts(chat, box, retry, undo, clear)


def _connect(page: Any, server: ChatServer, parts: Parts, settings: list[Any], exchanges: Any, cards: Any, head: Any) -> None:
    """Which event does what."""

    async def refresh() -> tuple[Any, ...]:
        try:
            found, problem = await server.models(), ""
        except LmdeployError as e:
            found, problem = [], ui_chat.in_words(e)
        return found, _picker(found), gr.update(sources=["upload"] if any(c.sees for c in found) else []), _head(found, server.url, problem)

    async def ask(value: dict[str, Any], history: list[Exchange], known: list[ModelCard], *chosen: Any) -> AsyncGenerator[tuple[Any, ...], None]:
        question = (value.get("text") or "").strip()[: ui_chat.MAX_QUESTION]
        images = [str(path) for path in value.get("files") or ()][: ui_chat.MAX_IMAGES]
        if (question or images) and not _open(history):
            history[:] = ui_chat.kept([*history, Exchange(question, images)])  # in place: this very list is what a second Enter finds, however soon it comes
            async for picture in _answer(server, history, known, chosen):
                yield picture

    async def retry(history: list[Exchange], known: list[ModelCard], *chosen: Any) -> AsyncGenerator[tuple[Any, ...], None]:
        if history and not _open(history):
            history[-1] = Exchange(history[-1].question, history[-1].images)
            async for picture in _answer(server, history, known, chosen):
                yield picture

    async def stop(history: list[Exchange]) -> None:
        # not gradio's `cancels`: it may leave a page that waits for an event that is gone. The answer's own event ends as always, only sooner
        for exchange in history[-1:]:
            exchange.stop()

    def undo(history: list[Exchange]) -> tuple[Any, ...]:
        return history[:-1], *_picture(history[:-1], {"text": history[-1].question, "files": []} if history else None)

    def clear() -> tuple[Any, ...]:
        return [], *_picture([])

    shown = [exchanges, *parts.all()]
    page.load(refresh, None, [cards, settings[0], parts.box, head], **_PRIVATE)
    # gradio ignores a question while it counts the last one's event as under way, which is a moment longer than the answer: the buttons wait for that end, too
    ready = (lambda history: _buttons(history), exchanges, parts.all()[1:])
    parts.box.submit(ask, [parts.box, exchanges, cards, *settings], shown, concurrency_limit=QUEUE, **_PRIVATE).then(*ready, queue=False, **_PRIVATE)
    parts.retry.click(retry, [exchanges, cards, *settings], shown, concurrency_limit=QUEUE, **_PRIVATE).then(*ready, queue=False, **_PRIVATE)
    # these wait in no queue: a full one must not keep a reader from Stop
    parts.box.stop(stop, exchanges, None, queue=False, **_PRIVATE)
    parts.undo.click(undo, exchanges, shown, queue=False, **_PRIVATE)
    parts.clear.click(clear, None, shown, queue=False, **_PRIVATE)


async def _answer(server: ChatServer, history: list[Exchange], known: list[ModelCard], chosen: tuple[Any, ...]) -> AsyncGenerator[tuple[Any, ...], None]:
    """Pictures of the page while the last exchange is answered. The first one empties the box; the state is stored with it. The last one's buttons still wait."""
    yield history, *_picture(history, {"text": "", "files": []}, busy=True)
    try:
        if not known:  # the server was not there when the page was loaded
            known = await server.models()
        async for _ in ui_chat.answer(server, history, _read(known, chosen)):
            yield gr.skip(), *_picture(history, busy=True)
    except LmdeployError as e:
        history[-1].error = ui_chat.in_words(e)
        history[-1].close("failed")
    finally:
        history[-1].close("stopped")  # whatever ended it: an open one would keep the tab from asking again
    yield history, *_picture(history, busy=True)


def _read(known: list[ModelCard], chosen: tuple[Any, ...]) -> Settings:
    """The settings of the side bar, within the sliders' limits whatever a browser sends."""
    name, system, *numbers = chosen
    card = next((c for c in known if c.name == name), known[0] if known else ModelCard(str(name or "default")))
    values = {key: min(max(number, low), high) for (key, (_, low, high, _, _)), number in zip(SLIDERS.items(), numbers, strict=True)}
    whole = {key: int(values[key]) for key in ("max_new_tokens", "top_k", "memory")}
    return Settings(model=card.name, system=system or "", session_len=card.session_len, **{**values, **whole})


def _open(history: list[Exchange]) -> bool:
    """Whether the last answer is still under way."""
    return bool(history) and history[-1].open


def _picture(history: list[Exchange], box: dict[str, Any] | None = None, *, busy: bool = False) -> tuple[Any, ...]:
    """Values of `Parts.all()`; `box` replaces what the reader is typing, None leaves it alone. `busy`: the buttons are as while an answer is written."""
    return ui_chat.bubbles(history), *_buttons(history, box, busy=busy)


def _buttons(history: list[Exchange], box: dict[str, Any] | None = None, *, busy: bool = False) -> tuple[Any, ...]:
    """Values of all but the chat."""
    running = busy or _open(history)
    ready = gr.update(interactive=bool(history) and not running)
    typed: dict[str, Any] = {} if box is None else {"value": box}
    return gr.update(submit_btn=not running, stop_btn="Stop" if running else False, **typed), ready, ready, ready


def _picker(found: list[ModelCard]) -> Any:
    names = [c.name for c in found]
    return gr.update(choices=names, value=names[0] if names else None, interactive=len(names) > 1)


def _head(found: list[ModelCard] | None, url: str, problem: str = "") -> str:
    """Name of the page, and where it talks to."""
    if problem:
        return _title(f'<span class="lm-down">{escape(problem)}</span>')
    return _title(f"<span>{escape(', '.join(c.name for c in found[:3]) if found else url)}</span>")


def _title(rest: str) -> str:
    return f'<div class="lm-title"><b>lmdeploy</b>{rest}</div>'
