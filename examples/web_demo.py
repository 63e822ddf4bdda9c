"""A web chat of your own around `pipe.stream_infer`, with history, retry, undo and clear: `python examples/web_demo.py [MODEL]`.

Needs gradio (`pip install gradio`). Every visitor has a history of their own; many may talk at once.
"""

import sys
from collections.abc import Iterator
from typing import Any

import gradio as gr

from lmdeploy import GenerationConfig, Pipeline, TurbomindEngineConfig, pipeline

History = list[dict[str, Any]]


def build(pipe: Pipeline) -> gr.Blocks:
    """The page."""

    def chat(query: str, history: History, max_new_tokens: int, top_p: float, top_k: int, temperature: float) -> Iterator[History]:
        query = (query or "").strip()
        if not query:
            yield history
            return
        gen_config = GenerationConfig(max_new_tokens=int(max_new_tokens))
        gen_config.top_p, gen_config.top_k, gen_config.temperature = top_p, int(top_k), temperature
        messages = [{"role": m["role"], "content": text_of(m["content"])} for m in history] + [{"role": "user", "content": query}]
        answer = ""
        for part in pipe.stream_infer(prompts=messages, gen_config=gen_config, do_preprocess=True, adapter_name=None):
            answer += part.text
            yield [*messages, {"role": "assistant", "content": answer}]

    def undo(history: History) -> History:
        return history[:-2]

    def last_question(history: History) -> tuple[str, History]:
        return (text_of(history[-2]["content"]), history[:-2]) if len(history) > 1 else ("", history)

    with gr.Blocks(title="lmdeploy web demo") as page:
        chatbot = gr.Chatbot(height=500)
        query = gr.Textbox(label="Your message")
        with gr.Row():
            send, retry, back, clear = gr.Button("Send", variant="primary"), gr.Button("Retry"), gr.Button("Undo"), gr.Button("Clear")
        sliders = [
            gr.Slider(1, 2048, 1024, step=1, label="Maximum new tokens"),
            gr.Slider(0.01, 1, 0.8, step=0.01, label="Top_p"),
            gr.Slider(1, 100, 40, step=1, label="Top_k"),
            gr.Slider(0.01, 1.5, 0.8, step=0.01, label="Temperature"),
        ]
        question = gr.State("")
        inputs = [query, chatbot, *sliders]
        for event in (send.click, query.submit):
            event(chat, inputs, chatbot, api_name="chat" if event == send.click else None).then(lambda: "", None, query)
        retry.click(last_question, chatbot, [question, chatbot]).then(chat, [question, chatbot, *sliders], chatbot)
        back.click(undo, chatbot, chatbot)
        clear.click(list, None, chatbot)
    return page


def text_of(content: Any) -> str:
    """gradio hands content back as text or as a list of typed parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


if __name__ == "__main__":
    with pipeline(sys.argv[1] if len(sys.argv) > 1 else None, backend_config=TurbomindEngineConfig(max_batch_size=16)) as loaded:
        build(loaded).queue(max_size=100).launch(server_name="127.0.0.1", server_port=7860)
