"""The built-in chat templates, as data, and which one a checkpoint's facts ask for. Its folder's name is never one of them.

Default system texts are those that the models were trained with (tests compare their SHA-256 with the published ones).
"""

from __future__ import annotations

from collections.abc import Callable

from lmdeploy.spec import ModelSpec
from lmdeploy.text.parts_template import Parts

INTERNLM2_SYSTEM = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory (上海人工智能实验室). "
    "It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as English and 中文.\n"
)
INTERNVL2_SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
INTERNVL2_5_SYSTEM = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
QWEN_SYSTEM = "You are a helpful assistant."
QWEN2D5_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAVA_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
LLAMA2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something not correct. "
    "If you don't know the answer to a question, please don't share false information."
)
LLAMA3_1_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


def _chatml(meta: str | None, *stops: str, newline: str = "\n", **more: str) -> Parts:
    """<|im_start|>role, newline, text, <|im_end|>; some families leave the newline after it out."""
    end = f"<|im_end|>{newline}"
    return Parts(
        system="<|im_start|>system\n",
        eosys=end,
        user="<|im_start|>user\n",
        eoh=end,
        assistant="<|im_start|>assistant\n",
        eoa="<|im_end|>",
        separator=newline,
        meta=meta,
        stop_words=("<|im_end|>", *stops),
        tool=more.get("tool", "<|im_start|>tool\n"),
        eotool=end,
        tool_style="plugin" if more.get("style") == "plugin" else "tool_call" if more.get("style") == "tool_call" else "none",
        no_thinking=more.get("no_thinking", ""),
    )


def _internlm2(meta: str | None, newline: str = "\n", stops: tuple[str, ...] = ("<|action_end|>",)) -> Parts:
    return _chatml(meta, *stops, newline=newline, tool="<|im_start|>environment\n", style="plugin")


def _llama3(dates: str = "", *stops: str) -> Parts:
    def header(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    return Parts(
        prefix="<|begin_of_text|>",
        system=header("system"),
        eosys="<|eot_id|>",
        user=header("user"),
        eoh="<|eot_id|>",
        assistant=header("assistant"),
        eoa="<|eot_id|>",
        stop_words=("<|eot_id|>", "<|end_of_text|>", *stops),
        tool=header("ipython"),
        eotool="<|eot_id|>",
        tool_style="function_tag" if dates else "none",
        system_preamble=dates,
    )


def _llama2(meta: str) -> Parts:
    return Parts(
        system="[INST] <<SYS>>\n",
        eosys="\n<</SYS>>\n\n",
        first_user="[INST] ",
        assistant=" [/INST] ",
        eoa="</s>",
        separator="<s>[INST] ",
        meta=meta,
    )


def _vicuna(meta: str) -> Parts:
    return Parts(eosys=" ", user="USER: ", eoh=" ", assistant="ASSISTANT: ", eoa="</s>", meta=meta, stop_words=("</s>",))


def _phi3() -> Parts:
    roles = {"system": "system", "user": "user", "assistant": "assistant"}
    headers = {part: f"<|{role}|>\n" for part, role in roles.items()}
    return Parts(**headers, eosys="<|end|>\n", eoh="<|end|>\n", eoa="<|end|>\n", stop_words=("<|end|>", "<|endoftext|>"))  # type: ignore[arg-type]


_MISTRAL = Parts(user="[INST] ", eoh=" [/INST]", eoa="</s>", system_in_user=True, tool_style="tool_list")
_GEMMA = Parts(
    user="<start_of_turn>user\n",
    eoh="<end_of_turn>\n",
    assistant="<start_of_turn>model\n",
    eoa="<end_of_turn>\n",
    stop_words=("<end_of_turn>",),
    system_in_user=True,
)

BUILTIN: dict[str, Parts] = {
    "base": Parts(),
    "chatml": _chatml(None),
    "codellama": _llama2(""),
    "gemma": _GEMMA,
    "internlm2": _internlm2(INTERNLM2_SYSTEM),
    "internlm3": _internlm2(INTERNLM2_SYSTEM),
    "internvl2-internlm2": _internlm2(INTERNVL2_SYSTEM, newline="", stops=("<|im_start|>",)),
    "internvl2_5": _internlm2(INTERNVL2_5_SYSTEM),
    "llama2": _llama2(LLAMA2_SYSTEM),
    "llama3": _llama3(),
    "llama3_1": _llama3(LLAMA3_1_DATES, "<|eom_id|>"),
    "llama3_2": _llama3(LLAMA3_1_DATES, "<|eom_id|>"),
    "llava-chatml": _chatml("Answer the questions.", newline=""),
    "llava-v1": _vicuna(LLAVA_SYSTEM),
    "mistral": _MISTRAL,
    "mixtral": _MISTRAL,
    "phi-3": _phi3(),
    "qwen": _chatml(QWEN_SYSTEM, style="tool_call"),
    "qwen2d5": _chatml(QWEN2D5_SYSTEM, style="tool_call"),
    "qwen3": _chatml(None, style="tool_call", no_thinking="<think>\n\n</think>\n\n"),
    "vicuna": _vicuna(VICUNA_SYSTEM),
    "yi": _chatml(None, "<|endoftext|>"),
}


def list_templates() -> list[str]:
    """Names of the built-in chat templates, sorted."""
    return sorted(BUILTIN)


def kind_of(spec: ModelSpec | None, has_token: Callable[[str], bool], sentencepiece_like: bool) -> str:
    """Name of the template that the model's facts ask for; 'base' when they ask for none."""
    model = f"{spec.model_type} {spec.architecture}".lower() if spec else ""
    chatml = has_token("<|im_start|>") and has_token("<|im_end|>")
    if has_token("<|start_header_id|>") and has_token("<|eot_id|>"):
        newer = (spec is not None and spec.rope.kind == "llama3") or has_token("<|python_tag|>") and has_token("<|eom_id|>")
        return "llama3_1" if newer else "llama3"
    if "internvl" in model and chatml:
        return "internvl2_5"
    if "internlm" in model or has_token("<|action_start|>"):
        return "internlm3" if chatml and "internlm3" in model else "internlm2" if chatml else "base"
    if "llava" in model:
        return "llava-chatml" if chatml else "llava-v1"
    if "qwen" in model and chatml:
        return "qwen3" if "qwen3" in model else "qwen2d5" if has_token("<tool_call>") else "qwen"
    if "gemma" in model and has_token("<start_of_turn>"):
        return "gemma"
    if "phi3" in model and has_token("<|end|>"):
        return "phi-3"
    if chatml:
        return "chatml"
    if "mixtral" in model or "mistral" in model:
        return "mixtral" if "mixtral" in model else "mistral"
    old_llama = "llama" in model and sentencepiece_like and spec is not None and 32_000 <= spec.vocab_size <= 32_128
    return "llama2" if old_llama else "base"
