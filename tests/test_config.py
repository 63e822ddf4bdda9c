"""Options check themselves; an error names field, value and limit."""

from __future__ import annotations

import logging

import pytest

from lmdeploy.config import ChatTemplateConfig, EngineConfig, GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.errors import ConfigError, RequestError


def test_every_keyword_of_the_course_scripts_is_accepted() -> None:
    config = TurbomindEngineConfig(
        model_name="internlm2",
        model_format="hf",
        tp=1,
        session_len=2048,
        max_batch_size=128,
        cache_max_entry_count=0.8,
        cache_block_seq_len=64,
        quant_policy=0,
        rope_scaling_factor=0.0,
        use_logn_attn=False,
        download_dir=None,
        revision=None,
        max_prefill_token_num=8192,
    )
    assert (config.session_len, config.max_batch_size, config.model_name, config.backend) == (2048, 128, "internlm2", "turbomind")


def test_old_spellings_mean_the_new_options() -> None:
    config = PytorchEngineConfig(block_size=32, num_gpu_blocks=0, prefill_interval=16, thread_safe=False, eviction_type="")
    assert config.cache_block_seq_len == 32
    assert config.cache_max_entry_count == 0.8
    assert config.backend == "pytorch"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sesion_len": 1}, ["sesion_len", "session_len"]),
        ({"session_len": 0}, ["session_len=0", ">= 1"]),
        ({"cache_max_entry_count": 0}, ["cache_max_entry_count=0", "> 0"]),
        ({"cache_max_entry_count": 1.5}, ["1.5", "whole number"]),
        ({"dtype": "int3"}, ["dtype='int3'", "bfloat16"]),
        ({"tp": 2}, ["tp=2", "tp=1"]),
        ({"quant_policy": 5}, ["quant_policy=5", "8"]),
        ({"quant_policy": 4}, ["quant_policy=4", "not available"]),
        ({"model_format": "awq"}, ["awq"]),
        ({"rope_scaling_factor": -1.0}, ["rope_scaling_factor=-1.0"]),
        ({"rope_scaling_factor": float("nan")}, ["rope_scaling_factor=nan"]),
    ],
)
def test_a_wrong_engine_option_names_value_and_limit(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        TurbomindEngineConfig(**options)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_an_option_without_effect_is_told(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("lmdeploy")
    propagate, logger.propagate = logger.propagate, True
    try:
        with caplog.at_level(logging.WARNING, "lmdeploy"):
            TurbomindEngineConfig(num_tokens_per_iter=4096)
    finally:
        logger.propagate = propagate
    assert "num_tokens_per_iter=4096 has no effect" in caplog.text


def test_replace_keeps_what_was_given() -> None:
    config = EngineConfig(session_len=100).replace(max_batch_size=3)
    assert config.given == {"session_len", "max_batch_size"}


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({}, False),
        ({"temperature": 0.7}, True),
        ({"top_p": 0.8}, True),
        ({"top_k": 40}, True),
        ({"top_k": 1, "temperature": 0.8}, False),
        ({"temperature": 0.0}, False),
        ({"do_sample": True}, True),
        ({"do_sample": False, "temperature": 0.8}, False),
        ({"max_new_tokens": 3}, False),
    ],
)
def test_do_sample_unset_means_sample_if_a_sampling_value_was_given(options: dict[str, object], samples: bool) -> None:
    assert GenerationConfig(**options).samples is samples


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, ["temperature=-1", "[0, 2]"]),
        ({"top_p": 1.5}, ["top_p=1.5", "[0, 1]"]),
        ({"max_new_tokens": 0}, ["max_new_tokens=0", ">= 1"]),
        ({"n": 1000}, ["n=1000", "[1, 128]"]),
        ({"stop_words": ["a"] * 10_000}, ["10000 entries", "64"]),
        ({"stop_words": [""]}, ["empty string"]),
        ({"repetition_penalty": 0}, ["repetition_penalty=0", "> 0"]),
        ({"logit_bias": {3: 1000.0}}, ["logit_bias[3]=1000.0", "[-100, 100]"]),
        ({"response_format": {"type": "json_object"}}, ["response_format", "not available"]),
        ({"max_new_token": 3}, ["max_new_token", "max_new_tokens"]),
    ],
)
def test_a_wrong_generation_option_names_value_and_limit(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises((RequestError, ConfigError)) as error:
        GenerationConfig(**options)
    text = str(error.value)
    assert all(word in text for word in words), text
    assert len(text) < 500


def test_chat_template_config_survives_json(tmp_path: object) -> None:
    config = ChatTemplateConfig("internlm2", meta_instruction="", stop_words=["X"])
    assert ChatTemplateConfig.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="meta_instruction"):
        ChatTemplateConfig.from_json('{"meta_instructio": "x"}')
    with pytest.raises(ConfigError, match="valid JSON"):
        ChatTemplateConfig.from_json("no-such-file.json")


def test_scripts_may_assign_fields_and_bad_values_are_refused_then_too() -> None:
    config = GenerationConfig(max_new_tokens=5)
    config.top_p = 0.8
    assert config.samples, "assigning counts as giving"
    with pytest.raises(RequestError, match="top_p=2"):
        config.top_p = 2
    with pytest.raises(ConfigError, match="top_p"):
        config.topp = 0.5
