"""Options check themselves; an error names field, value and limit."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmdeploy.config import ChatTemplateConfig, EngineConfig, GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.errors import ConfigError, RequestError
from lmdeploy.grammar import Grammar


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
        ({"session_len": 0}, ["session_len=0", "[1, 2147483648]"]),
        ({"cache_max_entry_count": 0}, ["cache_max_entry_count=0", "> 0"]),
        ({"cache_max_entry_count": 1.5}, ["1.5", "whole number"]),
        ({"dtype": "int3"}, ["dtype='int3'", "bfloat16"]),
        ({"tp": 2}, ["tp=2", "tp=1"]),
        ({"quant_policy": 5}, ["quant_policy=5", "8", "k8v4"]),
        ({"quant_policy": 42}, ["quant_policy=42", "not available", "k8v4"]),
        ({"quant_policy": "fp8_e5m2"}, ["quant_policy=17", "not available", "fp8"]),
        ({"quant_policy": True}, ["quant_policy=True", "k8v4"]),
        ({"model_format": "mxfp4"}, ["mxfp4", "awq", "gptq", "fp8"]),
        ({"head_bits": 3}, ["head_bits=3", "16, 8, 4"]),
        ({"model_format": "int4"}, ["int4", "awq"]),
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
    TurbomindEngineConfig(num_tokens_per_iter=4096)
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
        ({"repetition_penalty": 0}, ["repetition_penalty=0", "0.01"]),
        ({"logit_bias": {3: 1000.0}}, ["logit_bias[3]=1000.0", "[-100, 100]"]),
        ({"response_format": {"type": "yaml"}}, ["response_format.type='yaml'", "json_schema"]),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, ["json_schema.schema"]),
        ({"response_format": {"type": "regex_schema", "regex": "a"}}, ["response_format.regex is unknown", "regex_schema"]),
        ({"response_format": {"type": "regex_schema", "regex_schema": "a" * 70_000}}, ["70000 bytes", "65536"]),
        ({"response_format": {"type": "choice", "choice": ["a", ""]}}, ["choice", "empty"]),
        ({"response_format": {"type": "json_object"}, "grammar": Grammar("regex", "a")}, ["response_format and grammar"]),
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


def test_a_refused_assignment_leaves_the_config_as_it_was() -> None:
    config = GenerationConfig()
    with pytest.raises(RequestError):
        config.temperature = 3
    assert config.temperature == 0.8
    assert config.given == frozenset()
    config.max_new_tokens = 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_new_tokens": "512"}, ["max_new_tokens='512'", "whole number"]),
        ({"max_new_tokens": 5.5}, ["max_new_tokens=5.5", "whole number"]),
        ({"max_new_tokens": True}, ["max_new_tokens=True", "whole number"]),
        ({"n": 1.5}, ["n=1.5", "whole number"]),
        ({"random_seed": 1.5}, ["random_seed=1.5", "whole number"]),
        ({"logprobs": 2.5}, ["logprobs=2.5", "whole number"]),
        ({"temperature": "0.8"}, ["temperature='0.8'", "number"]),
        ({"temperature": True}, ["temperature=True", "number"]),
        ({"temperature": float("nan")}, ["temperature=nan", "[0, 2]"]),
        ({"max_new_tokens": float("inf")}, ["max_new_tokens=inf", "whole number"]),
        ({"ignore_eos": "false"}, ["ignore_eos='false'", "True or False"]),
        ({"do_sample": "no"}, ["do_sample='no'", "True or False"]),
        ({"stop_words": "END"}, ["stop_words='END'", "list"]),
        ({"stop_words": ["x" * 10_000]}, ["stop_words=", "10000 characters", "8192"]),
        ({"stop_token_ids": [True]}, ["stop_token_ids", "token ids"]),
        ({"logit_bias": [3]}, ["logit_bias=[3]", "dict"]),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(RequestError) as error:
        GenerationConfig(**options)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert error.value.param in options


def test_numbers_of_other_libraries_become_pythons_own() -> None:
    config = GenerationConfig(
        max_new_tokens=np.int64(5), top_k=40.0, top_p=np.float32(0.5), temperature=1, ignore_eos=np.bool_(True), skip_special_tokens=0, stop_words=("a",)
    )
    assert (config.max_new_tokens, config.top_k, config.top_p, config.stop_words) == (5, 40, 0.5, ["a"])
    assert (type(config.max_new_tokens), type(config.top_k), type(config.top_p)) == (int, int, float)
    assert config.ignore_eos is True
    assert config.skip_special_tokens is False
    engine = EngineConfig(session_len=np.int32(100), tp=1.0, download_dir=Path("/x"), enable_prefix_caching=1)
    assert (type(engine.session_len), type(engine.tp), engine.download_dir, engine.enable_prefix_caching) == (int, int, "/x", True)
    for wrong in ({"session_len": "2048"}, {"enable_prefix_caching": "no"}, {"hf_overrides": "x"}, {"dtype": ["auto"]}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}="):
            EngineConfig(**wrong)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, dataclasses.replace, lambda c: pickle.loads(pickle.dumps(c)), lambda c: c.replace()])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"top_p": 0.5, "max_new_tokens": 3}])
def test_copies_of_a_config_remember_what_was_given(make: Callable[[GenerationConfig], GenerationConfig], options: dict[str, Any]) -> None:
    first = GenerationConfig(**options)
    other = make(first)
    assert other == first
    assert other.given == first.given
    assert other.samples is first.samples
    other.max_new_tokens = 99
    assert first.max_new_tokens != 99
    assert "max_new_tokens" not in first.given or "max_new_tokens" in options


def test_dataclasses_replace_adds_only_the_change() -> None:
    assert dataclasses.replace(GenerationConfig(), max_new_tokens=5).given == {"max_new_tokens"}
    assert not dataclasses.replace(GenerationConfig(), max_new_tokens=5).samples
    assert dataclasses.replace(TurbomindEngineConfig(session_len=9), max_batch_size=2).given == {"session_len", "max_batch_size"}
    assert type(dataclasses.replace(PytorchEngineConfig(), session_len=3)) is PytorchEngineConfig


def test_replace_knows_old_spellings() -> None:
    config = EngineConfig().replace(block_size=32, num_gpu_blocks=0)
    assert config.cache_block_seq_len == 32
    assert config.given == {"cache_block_seq_len"}
    with pytest.raises(ConfigError, match="session_len"):
        config.replace(sesion_len=3)


def test_configs_compare_and_print_by_their_values() -> None:
    assert TurbomindEngineConfig(session_len=9) == TurbomindEngineConfig(session_len=9)
    assert TurbomindEngineConfig() != PytorchEngineConfig()
    assert TurbomindEngineConfig("float32", None, 1, 77).session_len == 77
    assert repr(TurbomindEngineConfig(session_len=9)).startswith("TurbomindEngineConfig(dtype='auto'")
