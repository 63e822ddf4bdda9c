"""Flags: made from the configs, both spellings, switches that mean what is written, mistakes in one clear line."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lmdeploy.cli.chat import add_chat_flags, generation_config
from lmdeploy.cli.flags import UNSUPPORTED, FlagParser, add_config_flags, engine_config, template_config
from lmdeploy.config import ChatTemplateConfig, EngineConfig, GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.errors import ConfigError
from lmdeploy.serving.options import ServerConfig


def parser() -> FlagParser:
    """The flags of `lmdeploy chat`."""
    made = FlagParser("lmdeploy chat", "Talk.")
    add_chat_flags(made)
    return made


def engine(*words: str) -> EngineConfig:
    """The engine's config of a command line."""
    return engine_config(parser().parse_args(list(words)))


def generation(*words: str) -> GenerationConfig:
    """The answers' config of a command line."""
    return generation_config(parser().parse_args(list(words)))


def test_flags_with_dashes_and_underscores_are_alike() -> None:
    assert engine("--cache-max-entry-count", "0.4") == engine("--cache_max_entry_count", "0.4") == engine("--cache_max_entry_count=0.4")


def test_underscores_of_values_stay() -> None:
    assert parser().parse_args(["my_model", "--download-dir=/a_b/c_d"]).model_path == "my_model"
    assert engine("--download-dir=/a_b/c_d").download_dir == "/a_b/c_d"


def test_config_remembers_only_the_flags_that_were_given() -> None:
    assert engine("--session-len", "128").given == {"session_len"}
    assert engine().given == frozenset()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--enable-prefix-caching", "False"], False),
        (["--enable-prefix-caching", "false"], False),
        (["--enable_prefix_caching=0"], False),
        (["--enable-prefix-caching", "True"], True),
        (["--enable-prefix-caching"], True),
        ([], True),
    ],
)
def test_a_switch_means_the_value_that_is_written(words: list[str], expected: bool) -> None:
    assert engine(*words).enable_prefix_caching is expected


def test_a_switch_does_not_swallow_the_model() -> None:
    args = parser().parse_args(["--eager-mode", "MODEL", "--use-logn-attn"])
    assert args.model_path == "MODEL"
    config = engine_config(args)
    assert config.eager_mode is True
    assert config.use_logn_attn is True


def test_none_is_written_as_the_help_says_it() -> None:
    assert generation("--max-new-tokens", "None").max_new_tokens is None
    assert generation().max_new_tokens == 1024
    with pytest.raises(ConfigError, match="invalid int value: 'many'"):
        generation("--max-new-tokens", "many")


def test_help_shows_a_list_option_s_default() -> None:
    server = FlagParser("server", "")
    add_config_flags(server, ServerConfig, title="Server")
    assert "HTTP methods for those pages (default: *)" in " ".join(server.format_help().split())


@pytest.mark.parametrize("field", [f for f in dataclasses.fields(EngineConfig) if f.metadata["flag"]], ids=lambda f: f.name)
def test_help_of_every_engine_option_shows_its_meaning_and_default(field: dataclasses.Field[object]) -> None:
    text = " ".join(parser().format_help().split())
    flag = {"device_type": "device"}.get(field.name, field.name).replace("_", "-")
    assert f"--{flag} " in text
    assert " ".join(field.metadata["help"].split()) in text
    if field.default is not None:
        assert f"(default: {field.default})" in text
    assert all(str(choice) in text for choice in field.metadata["choices"] or ())


def test_backend_chooses_the_config_class() -> None:
    assert type(engine("--backend", "pytorch")) is PytorchEngineConfig
    assert type(engine("--backend", "turbomind")) is type(engine()) is TurbomindEngineConfig


def test_device_has_the_command_lines_name() -> None:
    assert engine("--device", "cpu").device_type == engine("--device-type", "cpu").device_type == "cpu"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--sesion-len", "4"], ["--sesion-len", "did you mean --session-len"]),
        (["--session", "4"], ["--session", "--session-len"]),  # no silent abbreviations
        (["--zzz"], ["unknown flag --zzz"]),
        (["--session-len", "many"], ["--session-len", "many"]),
        (["--session-len", "0"], ["session_len=0", "[1, 2147483648]"]),
        (["--session-len"], ["--session-len", "expected one argument"]),
        (["--dtype", "int3"], ["--dtype", "int3", "bfloat16"]),
        (["--cache-max-entry-count", "-1"], ["cache_max_entry_count=-1", "> 0"]),
        (["--cache-max-entry-count", "nan"], ["cache_max_entry_count=nan"]),
        (["--eager-mode=maybe"], ["maybe", "neither True nor False"]),
        (["--backend", "vllm"], ["vllm", "turbomind"]),
        (["a", "b"], ["unexpected argument 'b'"]),
        (["--tp", "2"], ["tp=2", "not available"]),
        (["--quant-policy", "turbo_quant"], ["quant_policy=42", "not available", "k8v4"]),
        (["--adapters", "/lora"], ["adapters", "not available"]),
        (["--dp", "2"], ["dp=2", "not available"]),
        (["--role", "Prefill"], ["--role Prefill", "not available"]),
        (["--language-model-only"], ["--language-model-only", "not available"]),
        (["--hf-overrides", "{"], ["--hf-overrides", "JSON"]),
        (["--hf-overrides", "[]"], ["object", "list"]),
        (["--adapters", "a", "b=c"], ["NAME=PATH"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(words: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        engine(*words)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_neutral_values_of_other_systems_flags_are_accepted() -> None:
    words = ["--tp", "1", "--quant-policy", "0", "--role", "Hybrid", "--communicator", "nccl", "--async", "1", "--num-tokens-per-iter", "0"]
    words += ["--dp", "1", "--nnodes", "1", "--adapters", "--max-prefill-iters", "1", "--kernel-block-size", "-1", "--distributed-executor-backend", "uni"]
    config = engine(*words)
    assert config == EngineConfig() or dataclasses.asdict(config) == {**dataclasses.asdict(EngineConfig()), "distributed_executor_backend": "uni"}


def test_kv_policies_are_written_as_names_or_numbers() -> None:
    for word, value in (("8", 8), ("int4", 4), ("k8v4", "k8v4"), ("fp8", 16), ("none", 0)):
        assert engine("--quant-policy", word).quant_policy == value
    config = engine("--quant-policy", "4", "--kv-rotation", "False", "--strict-quality")
    assert config.kv_rotation is False and config.strict_quality and config.given == {"quant_policy", "kv_rotation", "strict_quality"}
    text = parser().format_help()
    assert text.index("--quant-policy {0,8,k8v4,4,fp8}") < text.index("Accepted for compatibility"), "it is an option like any other"


def test_every_unsupported_flag_is_known_to_the_parser() -> None:
    known = set(parser()._option_string_actions)
    assert {"--" + name.replace("_", "-") for name in UNSUPPORTED} <= known


def test_old_spellings_of_engine_options_are_understood() -> None:
    assert engine("--block-size", "32").cache_block_seq_len == 32
    assert engine("--hf-overrides", '{"rope_theta": 5}').hf_overrides == {"rope_theta": 5}


def test_conversation_defaults_are_the_documented_ones() -> None:
    gen = generation()
    assert (gen.top_k, gen.top_p, gen.temperature, gen.max_new_tokens, gen.random_seed, gen.samples) == (40, 0.8, 0.8, 1024, None, True)


def test_generation_flags_reach_the_config() -> None:
    gen = generation("--top-k", "7", "--temperature", "0.5", "--seed", "3", "--max-new-tokens", "9", "--stop-words", "a", "b c")
    assert (gen.top_k, gen.temperature, gen.random_seed, gen.max_new_tokens, gen.stop_words) == (7, 0.5, 3, 9, ["a", "b c"])


@pytest.mark.parametrize("words", [["--greedy"], ["--top-k", "1"], ["--temperature", "0"]])
def test_greedy_answers_can_be_asked_for(words: list[str]) -> None:
    assert generation(*words).samples is False


@pytest.mark.parametrize(("flag", "value"), [("--temperature", "-1"), ("--top-p", "1.5"), ("--max-new-tokens", "0"), ("--top-k", "-2"), ("--seed", "-1")])
def test_a_sampling_value_out_of_range_is_a_mistake_of_the_command_line(flag: str, value: str) -> None:
    with pytest.raises(ConfigError, match=value):
        generation(flag, value)


def test_template_flags_make_a_template_config(tmp_path: Path) -> None:
    def template(*words: str) -> ChatTemplateConfig | None:
        return template_config(parser().parse_args(list(words)))

    assert template() is None
    by_name = template("--chat-template", "llama2", "--meta-instruction", "Be brief.")
    assert (by_name.model_name, by_name.meta_instruction) == ("llama2", "Be brief.")
    assert template("--meta-instruction", "").meta_instruction == ""
    file = tmp_path / "t.json"
    file.write_text('{"model_name": "vicuna", "capability": "chat"}')
    assert template("--chat-template", str(file), "--cap", "completion").capability == "completion"


def test_a_template_file_with_an_unknown_key_names_it(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.write_text('{"modle_name": "x"}')
    with pytest.raises(ConfigError, match="modle_name.*model_name"):
        template_config(parser().parse_args(["--chat-template", str(file)]))
