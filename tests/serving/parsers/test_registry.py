"""Which notation a model writes: told by its template, its own or the built-in one of its family; never by a folder's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lmdeploy.config import ChatTemplateConfig
from lmdeploy.serving.parsers.registry import REASONING_FORMATS, TOOL_FORMATS, reasoning_format, tool_format
from lmdeploy.text.chat_template import ChatTemplate, load_chat_template
from tests.text.samples import INTERNLM2, TINY, tokenizer


def with_template(folder: Path, text: str) -> ChatTemplate:
    """A checkpoint whose own template is `text`."""
    shutil.copy(TINY / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
    return load_chat_template(folder, None, tokenizer(TINY))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("{% if tools %}call with <tool_call>{% endif %}", "hermes"),
        ("{% if tools %}[AVAILABLE_TOOLS]{% endif %}[TOOL_CALLS]", "mistral"),
        ("{% if tools %}<function=name>{% endif %}<|python_tag|>", "llama3_1"),
        ('{% if tools is not none %}Respond in the format {"name":, "parameters":}{% endif %}<|start_header_id|>ipython', "llama3"),
        ("{% if tools %}{{ tools }}{% endif %}", "json"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "internlm"),  # no place for tools: the stand-in of the vocabulary's family writes them
    ],
)
def test_the_checkpoints_template_tells(tmp_path: Path, text: str, name: str) -> None:
    assert tool_format(None, with_template(tmp_path, text)) is TOOL_FORMATS[name]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("internlm2", "internlm"), ("llama3_1", "llama3_1"), ("qwen2d5", "hermes"), ("qwen3", "hermes"), ("mistral", "mistral"), ("vicuna", None)],
)
def test_the_builtin_template_tells(name: str, wanted: str | None) -> None:
    template = load_chat_template(TINY, None, tokenizer(TINY), ChatTemplateConfig(model_name=name))
    assert tool_format(None, template) is (TOOL_FORMATS[wanted] if wanted else None)
    assert (reasoning_format(None, template) is not None) == (name == "qwen3")


def test_a_name_overrides_and_none_switches_off(tmp_path: Path) -> None:
    template = with_template(tmp_path, "{{ tools }}<tool_call><think></think>")
    assert tool_format("mistral", template) is TOOL_FORMATS["mistral"] and tool_format("none", template) is None
    assert reasoning_format(None, template) is REASONING_FORMATS["qwen3"] and reasoning_format("none", template) is None


def test_internlm2s_tags_are_its_special_tokens() -> None:
    for folder in (TINY, INTERNLM2):
        own = tokenizer(folder)
        for tag in TOOL_FORMATS["internlm"].tags:
            ids = own.encode(tag, add_bos=False)
            assert len(ids) == 2 and set(ids) <= own.special_ids
