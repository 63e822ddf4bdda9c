"""Tiny random models that speak a family's notation: its special tokens, its chat template, bytes as tokens. What they write is noise, unless a grammar binds them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers import write_llama

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
#: family -> (special tokens, tokens that were only added, what the template says of tools and reasoning)
FAMILIES: dict[str, tuple[list[str], list[str], str]] = {
    "internlm": (["<|action_start|>", "<|action_end|>", "<|plugin|>", "<|interpreter|>"], [], "{% if tools %}<|action_start|><|plugin|>{% endif %}"),
    "hermes": ([], ["<tool_call>", "</tool_call>"], "{% if tools %}<tool_call>{{ tools[0].function.name }}{% endif %}"),
    "llama3_1": (["<|python_tag|>", "<|eom_id|>"], [], "{% if tools %}<function={% endif %}"),
    "llama3": (["<|python_tag|>", "<|eom_id|>"], [], "{% if tools %}Environment: ipython{% endif %}"),
    "mistral": (["[TOOL_CALLS]", "[AVAILABLE_TOOLS]"], [], "{% if tools %}[TOOL_CALLS]{% endif %}"),
    "json": ([], [], "{% if tools %}{{ tools|length }}{% endif %}"),
    "deepseek": ([], ["<tool_call>", "</tool_call>", "<think>", "</think>"], "{% if tools %}<tool_call>{% endif %}"),
    "qwen3": ([], ["<tool_call>", "</tool_call>", "<think>", "</think>"], "{% if tools %}<tool_call>{% endif %}"),
}
_OFF = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
THINKING = {"deepseek": _OFF + "{% else %}<think>\n{% endif %}", "qwen3": _OFF + "{% endif %}"}


def write_family(folder: Path, family: str) -> Path:
    """A model folder; the answer of `deepseek` begins within the reasoning, that of `qwen3` may begin with it."""
    special, added, told = FAMILIES[family]
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", *special]
    write_llama(folder, vocab_size=256 + len(special) + len(added), max_position_embeddings=4096, bos_token_id=256, eos_token_id=257)
    _write_tokenizer(folder, special, added)
    template = told + CHATML + THINKING.get(family, "")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": "<|im_end|>"}))
    return folder


def _write_tokenizer(folder: Path, special: list[str], added: list[str]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.add_tokens([AddedToken(text) for text in added])
    tokenizer.save(str(folder / "tokenizer.json"))
