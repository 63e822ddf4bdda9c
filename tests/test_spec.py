"""config.json of every supported family, its defaults, and every way it can be wrong."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.errors import CheckpointError, ConfigError, LmdeployError
from lmdeploy.spec import FAMILIES, ModelSpec, load_spec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}


def config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """A small valid config; a change to Ellipsis removes the key."""
    raw = {**LLAMA, "architectures": [architecture], **changes}
    return {key: value for key, value in raw.items() if value is not ...}


def refusal(**changes: Any) -> str:
    """The error that the changed config gives."""
    with pytest.raises(CheckpointError) as caught:
        ModelSpec.from_config(config(**changes), where="/m/config.json")
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith("/m/config.json")
    return text


def test_every_supported_config_gives_the_numbers_of_its_own_file(shared_configs: dict[str, dict[str, Any]]) -> None:
    for name, raw in shared_configs.items():
        text = raw.get("llm_config", raw)
        spec = ModelSpec.from_config(raw)
        assert (spec.hidden_size, spec.num_layers, spec.vocab_size) == (text["hidden_size"], text["num_hidden_layers"], text["vocab_size"]), name
        assert spec.num_heads * spec.head_dim == text["num_attention_heads"] * (text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]), (
            name
        )
        assert spec.architecture == raw["architectures"][0]
        assert spec.dtype == text["torch_dtype"]


@pytest.fixture
def shared_configs() -> dict[str, dict[str, Any]]:
    """Published configs, written down here because the tests must run without the shared folder."""
    internlm = config("InternLM2ForCausalLM", bias=False, rope_scaling={"type": "dynamic", "factor": 2.0}, rope_theta=1000000, torch_dtype="bfloat16")
    vision = {"architectures": ["InternVLChatModel"], "llm_config": internlm, "vision_config": {"hidden_size": 3200, "num_attention_heads": 25}}
    return {
        "internlm2.5": internlm,
        "internvl": vision,
        "qwen3": config("Qwen3ForCausalLM", head_dim=128, rope_scaling=None, sliding_window=None, torch_dtype="bfloat16"),
        "llava": config("LlavaLlamaForCausalLM", rope_scaling=None, torch_dtype="float16"),
    }


@pytest.mark.parametrize(
    ("architecture", "changes", "biases"),
    [
        ("LlamaForCausalLM", {}, (False, False, False)),
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}, (True, True, True)),
        ("InternLM2ForCausalLM", {"bias": False}, (False, False, False)),
        ("InternLM2ForCausalLM", {"bias": True}, (True, True, False)),
        ("InternLM3ForCausalLM", {"qkv_bias": True, "bias": False}, (True, False, False)),
        ("InternLM3ForCausalLM", {"qkv_bias": False, "bias": True}, (False, True, True)),
        ("InternLM3ForCausalLM", {"attention_bias": True, "mlp_bias": True}, (True, True, True)),
        ("InternLM2ForCausalLM", {}, (False, False, False)),
        ("Qwen2ForCausalLM", {}, (True, False, False)),
        ("Qwen3ForCausalLM", {"attention_bias": True}, (True, True, False)),
        ("MistralForCausalLM", {"attention_bias": True}, (False, False, False)),
    ],
)
def test_biases_are_those_of_the_architecture(architecture: str, changes: dict[str, Any], biases: tuple[bool, bool, bool]) -> None:
    spec = ModelSpec.from_config(config(architecture, **changes))
    assert (spec.qkv_bias, spec.o_bias, spec.mlp_bias) == biases


def test_only_qwen3_normalises_heads_and_its_head_dim_defaults_to_128() -> None:
    with_norm = {name for name in FAMILIES if ModelSpec.from_config(config(name)).qk_norm}
    assert with_norm == {"Qwen3ForCausalLM", "Qwen3MoeForCausalLM"}
    assert ModelSpec.from_config(config("Qwen3ForCausalLM")).head_dim == 128
    assert ModelSpec.from_config(config("Qwen3MoeForCausalLM")).head_dim == 8


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("MistralForCausalLM", {"sliding_window": None}, (0, ())),
        ("MistralForCausalLM", {"sliding_window": 64}, (64, ())),
        ("MistralForCausalLM", {}, (4096, ())),
        ("MixtralForCausalLM", {}, (0, ())),
        ("Qwen2ForCausalLM", {"sliding_window": 64, "use_sliding_window": False}, (0, ())),
        ("Qwen2ForCausalLM", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 3}, (64, (False, False, False, True))),
        ("Qwen2ForCausalLM", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 4}, (0, ())),
        ("Qwen2ForCausalLM", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 0}, (64, ())),
        (
            "Qwen3ForCausalLM",
            {"sliding_window": 64, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2},
            (64, (True, False, True, False)),
        ),
        ("Qwen3MoeForCausalLM", {"sliding_window": 64, "use_sliding_window": True}, (64, ())),
        ("LlamaForCausalLM", {"sliding_window": 64}, (0, ())),
    ],
)
def test_sliding_windows(architecture: str, changes: dict[str, Any], expected: tuple[int, tuple[bool, ...]]) -> None:
    spec = ModelSpec.from_config(config(architecture, **changes))
    assert (spec.sliding_window, spec.window_layers) == expected


@pytest.mark.parametrize(
    "architecture",
    ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM", "InternLM3ForCausalLM"],
)
@pytest.mark.parametrize("changes", [{}, {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}, {"rope_theta": 5e5}])
def test_defaults_are_those_of_transformers(architecture: str, changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    raw = config(architecture, **changes)
    theirs = getattr(transformers, architecture.removesuffix("ForCausalLM") + "Config")(**{k: v for k, v in raw.items() if k != "model_type"})
    ours = ModelSpec.from_config(raw)
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_window == (theirs.sliding_window or 0 if hasattr(theirs, "sliding_window") else 0) or not any(ours.window_layers)
    if ours.window_layers:
        assert [kind == "sliding_attention" for kind in theirs.layer_types] == list(ours.window_layers)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert (ours.tie_embeddings, ours.norm_eps) == (theirs.tie_word_embeddings, theirs.rms_norm_eps)
    if ours.num_experts:
        assert (ours.num_experts, ours.experts_per_token) == (
            theirs.num_local_experts if hasattr(theirs, "num_local_experts") else theirs.num_experts,
            theirs.num_experts_per_tok,
        )


def test_mixtral_experts() -> None:
    spec = ModelSpec.from_config(config("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2))
    assert (spec.num_experts, spec.experts_per_token, spec.moe_intermediate_size, spec.norm_topk_prob, spec.dense_layers) == (4, 2, 128, True, ())


def test_qwen3_moe_dense_layers_are_the_named_and_the_skipped_ones() -> None:
    raw = config(
        "Qwen3MoeForCausalLM", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True, decoder_sparse_step=2, mlp_only_layers=[3]
    )
    spec = ModelSpec.from_config(raw)
    assert (spec.num_experts, spec.experts_per_token, spec.moe_intermediate_size, spec.norm_topk_prob) == (4, 2, 32, True)
    assert spec.dense_layers == (0, 2, 3)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16, "mscale": 1.0, "mscale_all_dim": 0.5}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def test_rope_kinds_are_read_with_their_numbers() -> None:
    def rope(table: dict[str, Any] | None, **changes: Any) -> Any:
        return ModelSpec.from_config(config(rope_scaling=table, **changes)).rope

    assert rope(None).kind == "default"
    assert (rope({"type": "linear", "factor": 2}).kind, rope({"type": "linear", "factor": 2}).factor) == ("linear", 2.0)
    dynamic = rope({"type": "dynamic", "factor": 2.0})
    assert (dynamic.kind, dynamic.original_max_position, dynamic.depends_on_length) == ("dynamic", 256, True)
    llama3 = rope(LLAMA3)
    assert (llama3.factor, llama3.low_freq_factor, llama3.high_freq_factor, llama3.original_max_position) == (8.0, 1.0, 4.0, 128)
    yarn = rope(YARN)
    assert (yarn.factor, yarn.beta_fast, yarn.beta_slow, yarn.mscale, yarn.mscale_all_dim, yarn.truncate) == (4.0, 16.0, 1.0, 1.0, 0.5, True)
    assert (yarn.original_max_position, yarn.attention_factor) == (64, None)
    longrope = rope(LONGROPE, original_max_position_embeddings=64)
    assert (longrope.kind, longrope.factor, longrope.long_factor, longrope.original_max_position) == ("longrope", 4.0, (2.0,) * 4, 64)


@pytest.mark.parametrize("table", [{"rope_type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}, LLAMA3, YARN, LONGROPE])
def test_rope_parameters_of_transformers_5_mean_the_same_as_rope_scaling(table: dict[str, Any]) -> None:
    old = ModelSpec.from_config(config(rope_scaling=table, rope_theta=5e5)).rope
    new = ModelSpec.from_config(config(rope_parameters={**table, "rope_theta": 5e5})).rope
    nested = ModelSpec.from_config(config(rope_parameters={"full_attention": {**table, "rope_theta": 5e5}})).rope
    assert old == new == nested
    assert new.theta == 5e5


def test_partial_rotary_factor_sets_the_rotated_dimensions() -> None:
    assert ModelSpec.from_config(config(partial_rotary_factor=0.5)).rope.rotary_dim == 4
    assert ModelSpec.from_config(config(rope_parameters={"partial_rotary_factor": 0.5})).rope.rotary_dim == 4


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"type": "spiral", "factor": 2}, ("unknown kind", "'spiral'", "longrope", "llama3")),
        ({"type": "linear"}, ("factor", "missing")),
        ({"type": "linear", "factor": 0}, ("factor=0", "above 0")),
        ({"type": "linear", "factor": math.nan}, ("factor=nan",)),
        ({"type": "dynamic", "factor": "2"}, ("factor='2'", "not a number")),
        ({**LLAMA3, "high_freq_factor": 1.0}, ("high_freq_factor=1.0", "low_freq_factor")),
        ({**LONGROPE, "short_factor": [1.0] * 3}, ("short_factor", "3", "4 are needed")),
        ({**LONGROPE, "long_factor": [1.0, 1.0, 1.0, -1.0]}, ("long_factor", "positive")),
        ({**YARN, "attention_factor": [1]}, ("attention_factor=[1]",)),
        ("linear", ("rope_scaling='linear'", "not a JSON object")),
        ({"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "linear", "factor": 2}}, ("different",)),
        ({"type": "default", "partial_rotary_factor": 0.2}, ("partial_rotary_factor",)),
    ],
)
def test_wrong_rope_numbers_are_refused(table: Any, words: tuple[str, ...]) -> None:
    text = refusal(rope_scaling=table)
    assert all(word in text for word in words), text


def test_longest_context_is_the_smallest_length_key() -> None:
    assert ModelSpec.from_config(config(max_sequence_length=128, seq_length=512)).max_position == 128
    assert ModelSpec.from_config(config(model_max_length=10**30)).max_position == 256


def test_without_a_length_key_2048_is_taken_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lmdeploy"):
        assert ModelSpec.from_config(config(max_position_embeddings=...)).max_position == 2048
    assert "2048" in caplog.text
    assert "max_position_embeddings" in caplog.text


def test_stop_ids_are_collected_from_both_files() -> None:
    raw = config(eos_token_id=[2, 5], pad_token_id=-1, bos_token_id=1)
    spec = ModelSpec.from_config(raw, {"eos_token_id": [7, 2]})
    assert (spec.eos_token_ids, spec.bos_token_id, spec.pad_token_id) == ((2, 5, 7), 1, None)
    assert ModelSpec.from_config(config(eos_token_id=3)).eos_token_ids == (3,)
    assert ModelSpec.from_config(config()).eos_token_ids == ()


@pytest.mark.parametrize(
    ("key", "value", "dtype"), [("torch_dtype", "bfloat16", "bfloat16"), ("dtype", "torch.float16", "float16"), ("dtype", None, "float32")]
)
def test_dtype_old_and_new_spelling(key: str, value: Any, dtype: str) -> None:
    assert ModelSpec.from_config(config(**{key: value})).dtype == dtype


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": ...}, ("'hidden_size' is missing",)),
        ({"hidden_size": 66}, ("hidden_size=66", "num_attention_heads=8")),
        ({"num_key_value_heads": 3}, ("num_attention_heads=8", "num_key_value_heads=3")),
        ({"num_key_value_heads": 16}, ("num_key_value_heads=16",)),
        ({"num_attention_heads": 0}, ("num_attention_heads=0", "[1, ")),
        ({"hidden_size": -64}, ("hidden_size=-64",)),
        ({"hidden_size": 1 << 40}, ("hidden_size=1099511627776",)),
        ({"hidden_size": "64"}, ("hidden_size='64'", "whole number")),
        ({"hidden_size": True}, ("hidden_size=True",)),
        ({"num_hidden_layers": 4.5}, ("num_hidden_layers=4.5",)),
        ({"head_dim": 7}, ("head_dim=7", "odd")),
        ({"vocab_size": None}, ("'vocab_size' is missing",)),
        ({"rms_norm_eps": 0}, ("rms_norm_eps=0",)),
        ({"rope_theta": 10**400}, ("rope_theta=1000",)),
        ({"hidden_act": "gelu"}, ("hidden_act='gelu'", "silu")),
        ({"torch_dtype": "int3"}, ("torch_dtype='int3'", "bfloat16")),
        ({"eos_token_id": "2"}, ("eos_token_id='2'",)),
        ({"architectures": []}, ("'architectures'",)),
        ({"architectures": [None]}, ("'architectures'",)),
        ({"tie_word_embeddings": "no"}, ("tie_word_embeddings='no'",)),
        ({"max_position_embeddings": "long"}, ("max_position_embeddings='long'",)),
    ],
)
def test_contradictions_name_key_and_value(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    text = refusal(**changes)
    assert all(word in text for word in words), text


def test_more_experts_per_token_than_experts_is_refused() -> None:
    text = refusal(architectures=["MixtralForCausalLM"], num_local_experts=2, num_experts_per_tok=4)
    assert "num_experts_per_tok=4" in text
    assert "num_local_experts=2" in text


@pytest.mark.parametrize("layers", [[4], ["a"], [[1]], [-1]])
def test_mlp_only_layers_must_be_layers(layers: list[Any]) -> None:
    assert "mlp_only_layers" in refusal(architectures=["Qwen3MoeForCausalLM"], mlp_only_layers=layers)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
KEYS = sorted(
    {
        *LLAMA,
        "rope_scaling",
        "rope_parameters",
        "rope_theta",
        "head_dim",
        "sliding_window",
        "layer_types",
        "eos_token_id",
        "num_experts",
        "llm_config",
        "quantization_config",
    }
)


@given(st.sampled_from(sorted(FAMILIES)), st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))
@settings(max_examples=300, deadline=None)
def test_any_json_gives_a_spec_or_one_clear_line(architecture: str, changes: dict[str, Any]) -> None:
    try:
        spec = ModelSpec.from_config({**config(architecture), "use_sliding_window": True, **changes})
    except LmdeployError as error:
        assert "\n" not in str(error)
    else:
        assert spec.num_heads % spec.num_kv_heads == 0
        assert 0 < spec.rope.rotary_dim <= spec.head_dim
        assert spec.max_position >= 1
        assert hash(spec.eos_token_ids) is not None


def write_model(folder: Path, raw: Any = None, generation: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(raw if isinstance(raw, str) else json.dumps(config() if raw is None else raw))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_load_spec_merges_overrides_and_both_files(tmp_path: Path) -> None:
    folder = write_model(tmp_path, config(rope_scaling=LLAMA3, eos_token_id=1), {"eos_token_id": 9})
    spec = load_spec(folder, {"rope_scaling": {"factor": 32.0}, "vocab_size": 50, "tie_word_embeddings": True})
    assert (spec.rope.kind, spec.rope.factor, spec.rope.original_max_position) == ("llama3", 32.0, 128)
    assert (spec.vocab_size, spec.tie_embeddings, spec.eos_token_ids) == (50, True, (1, 9))
    assert load_spec(folder, {"rope_scaling": None}).rope.kind == "default"


def test_overrides_must_be_a_table(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hf_overrides"):
        load_spec(write_model(tmp_path), [1])  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["{", "[]", "", '{"hidden_size": 1' + "0" * 5000 + "}", "[" * 100000, "\xff\xfe"])
def test_broken_json_is_one_line_naming_the_file(tmp_path: Path, text: str) -> None:
    folder = write_model(tmp_path, text)
    if text.startswith("\xff"):
        (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError) as caught:
        load_spec(folder)
    assert str(folder / "config.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_huge_config_is_not_read(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    with (folder / "config.json").open("r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError, match="too large"):
        load_spec(folder)


def test_a_folder_that_is_no_model_says_what_was_found(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"config\.json is missing; found notes\.txt"):
        load_spec(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        load_spec(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is a file"):
        load_spec(tmp_path / "notes.txt")
    write_model(tmp_path / "inner")
    with pytest.raises(CheckpointError, match="did you mean .*inner"):
        load_spec(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="LoRA"):
        load_spec(tmp_path)


@pytest.mark.parametrize(("name", "method"), [("quant_config.json", "awq"), ("quantize_config.json", "gptq")])
def test_a_quantization_config_in_a_file_of_its_own_is_read(tmp_path: Path, name: str, method: str) -> None:
    folder = write_model(tmp_path / "m")
    assert load_spec(folder).quantization is None
    (folder / name).write_text(json.dumps({"bits": 4, "group_size": 64}))
    assert load_spec(folder).quantization == {"quant_method": method, "bits": 4, "group_size": 64}
    (folder / "config.json").write_text(json.dumps(config(quantization_config={"quant_method": "other"})))
    assert load_spec(folder).quantization == {"quant_method": "other"}, "config.json comes first"
