"""What is recommended, what is refused, and by how much."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from lmdeploy.cli.flags import FlagParser, engine_config
from lmdeploy.cli.serve import add_api_server_flags
from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.plan.machines import GIB
from lmdeploy.plan.options import PlanConfig
from lmdeploy.plan.plan import KL_POLICIES, Plan, make_plan, shortage

SEVEN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "torch_dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with a config.json and nothing else."""
    folder = tmp_path / "seven"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SEVEN))
    return folder


def plan(model: Path, memory: str, options: dict[str, Any] | None = None, **wanted: Any) -> Plan:
    return make_plan(str(model), TurbomindEngineConfig(**options or {}), PlanConfig(gpu_memory=memory, **wanted))


def command(made: Plan) -> list[str]:
    assert made.advice is not None
    return shlex.split(made.advice.commands[-1])


def test_what_fits_as_it_is_needs_no_option(model: Path) -> None:
    made = plan(model, "24GB")
    assert made.fits
    assert command(made) == ["lmdeploy", "serve", "api_server", str(model)]


def test_quality_is_given_up_bit_by_bit_as_conversations_grow_in_number(model: Path) -> None:
    costs, seen = [], []
    for users in range(1, 140, 6):
        made = plan(model, "24GB", users=users, context=4096)
        if made.advice is not None:
            fit = made.advice.fit
            costs.append({"16 bit": 0.0, "fp8": 0.005, "W4": 0.02}[fit.weights] + KL_POLICIES[fit.policy])
            seen.append((fit.weights, fit.policy))
    assert costs == sorted(costs)
    assert list(dict.fromkeys(seen))[:4] == [("16 bit", 0), ("16 bit", 8), ("16 bit", "k8v4"), ("fp8", "k8v4")]
    assert seen[-1] == ("W4", 4)


def test_four_bit_weights_come_with_the_command_that_makes_them(model: Path) -> None:
    made = plan(model, "6GB", context=2048)
    assert not made.fits
    assert made.advice is not None
    quantise, serve = made.advice.commands
    assert quantise == f"lmdeploy lite auto_awq {model} --search-scale True --work-dir seven-4bit"
    assert serve.startswith("lmdeploy serve api_server seven-4bit --model-format awq")


def test_options_that_are_given_stay(model: Path) -> None:
    words = command(plan(model, "12GB", {"quant_policy": 4, "session_len": 8192, "cache_max_entry_count": 0.5}))
    assert words[words.index("--quant-policy") + 1] == "4"
    assert words[words.index("--session-len") + 1] == "8192"
    assert words[words.index("--cache-max-entry-count") + 1] == "0.5"


def test_a_recommended_command_is_one_that_the_server_takes_and_that_fits(model: Path) -> None:
    for memory, users, context in (("24GB", 40, 4096), ("12GB", 4, 8192), ("80GB", 300, 4096), ("16GB", 2, 2048)):
        words = command(plan(model, memory, users=users, context=context))
        parser = FlagParser("lmdeploy serve api_server", "Serve.")
        add_api_server_flags(parser)
        config = engine_config(parser.parse_args(words[3:]))
        again = make_plan(str(model), config.replace(model_format=config.model_format), PlanConfig(gpu_memory=memory, users=users, context=context))
        assert again.fits, (memory, users, words, shortage(again))


def test_a_share_is_raised_before_quality_is_given_up(model: Path) -> None:
    made = plan(model, "24GB")
    most = made.chosen.tokens // 64 * 64
    words = command(plan(model, "24GB", context=most + 640))
    assert "--quant-policy" not in words
    assert 0.8 < float(words[words.index("--cache-max-entry-count") + 1]) <= 0.9


def test_what_is_missing_is_what_must_be_added(model: Path) -> None:
    made = plan(model, "12GB", {"model_format": "hf", "quant_policy": 0}, users=4)
    assert not made.fits
    assert made.advice is None
    assert "more than there is" in shortage(made)
    enough = made.memory + made.chosen.missing
    assert plan(model, f"{enough}B", {"model_format": "hf", "quant_policy": 0}, users=4).fits
    assert not plan(model, f"{enough - 64 * made.chosen.bytes_per_token * 2}B", {"model_format": "hf", "quant_policy": 0}, users=4).fits


def test_nothing_that_fits_says_the_least_need(model: Path) -> None:
    made = plan(model, "2GB")
    assert made.advice is None
    assert made.least.need == min(f.need for f in made.grid if f.tp == 1)
    assert "the least need is" in shortage(made)


def test_a_checkpoint_that_is_quantised_stays_as_it_is(model: Path) -> None:
    (model / "config.json").write_text(json.dumps({**SEVEN, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}))
    made = plan(model, "24GB", users=100)
    assert {fit.weights for fit in made.grid} == {"AWQ"}
    assert made.storages == ("AWQ", "16 bit")
    assert "--model-format" not in command(made)


def test_ranks_share_the_model_and_are_named_as_unavailable(model: Path) -> None:
    one, two = plan(model, "24GB"), plan(model, "24GB", tp=2)
    assert two.chosen.weight_bytes < 0.6 * one.chosen.weight_bytes
    assert two.chosen.bytes_per_token * 2 == one.chosen.bytes_per_token
    assert two.advice is not None
    assert "tp=2" in two.advice.obstacle
    assert two.advice.commands[-1].endswith("--tp 2")
    with pytest.raises(ConfigError, match="tp=3 does not divide"):
        plan(model, "24GB", tp=3)


def test_a_context_beyond_the_session_or_the_model_is_told(model: Path) -> None:
    with pytest.raises(ConfigError, match="context=9000 is more than session_len=8192"):
        plan(model, "24GB", {"session_len": 8192}, context=9000)
    assert any("beyond the 32768 positions" in note for note in plan(model, "80GB", context=40000).notes)


def test_speed_is_bandwidth_over_what_a_step_reads(model: Path) -> None:
    made = plan(model, "24GB", bandwidth=1000.0, context=2048)
    first = made.speed[0]
    weights = sum(row.nbytes[0] for row in made.parts if row.part != "embedding")
    assert first.nbytes == weights + 1024 * made.chosen.bytes_per_token
    assert first.ceiling == pytest.approx(1e12 / first.nbytes)
    assert first.share is None, "no decode speed was measured on a GPU yet"


def test_memory_alone_gives_the_speed_of_each_card_that_is_sold_with_it(model: Path) -> None:
    made = plan(model, "24GB", users=3)
    assert [card.card for card in made.cards] == ["4090", "3090", "a10", "l4"] and made.card_batches == (1, 3, 8, 64)
    for card in made.cards:
        named = plan(model, "24GB", users=3, gpu=card.card)
        assert card.ceilings == tuple(row.ceiling for row in named.speed) and card.source == named.bandwidth_source
        assert not named.cards, "one card is one speed"
    assert (made.speed, made.bandwidth) == ((), None)
    assert plan(model, "23034MiB").cards == plan(model, "24GB").cards, "as nvidia-smi shows it"
    assert [card.card for card in plan(model, "40GB").cards] == ["a100-40g"]
    assert [card.card for card in plan(model, "80GB").cards] == ["h100", "a100-80g", "h100-pcie"]
    for memory, options in (("850MiB", {}), ("24GB", {"bandwidth": 500.0})):
        assert plan(model, memory, **options).cards == ()


def test_kv_of_a_head_that_cannot_be_packed_is_refused_like_at_start(model: Path) -> None:
    with pytest.raises(ConfigError, match="compute capability"):
        make_plan(str(model), TurbomindEngineConfig(quant_policy=16), PlanConfig(gpu="a100-40g"))
    assert make_plan(str(model), TurbomindEngineConfig(quant_policy=16), PlanConfig(gpu="l4")).chosen.kv == "fp8"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "'architectures' does not name"),
        (json.dumps({**SEVEN, "architectures": ["GPT2LMHeadModel"]}), "'GPT2LMHeadModel' is not supported"),
        (json.dumps({k: v for k, v in SEVEN.items() if k != "hidden_size"}), "'hidden_size' is missing"),
        (json.dumps({**SEVEN, "num_hidden_layers": "many"}), "is not a whole number"),
        (json.dumps({**SEVEN, "quantization_config": {"quant_method": "magic"}}), "quant_method='magic'"),
        (json.dumps({**SEVEN, "quantization_config": {"quant_method": "awq", "bits": 3, "group_size": 128}}), "bits=3"),
        (json.dumps({**SEVEN, "quantization_config": {"quant_method": "compressed-tensors"}}), "config_groups"),
        (json.dumps({**SEVEN, "mm_vision_tower": "somebody/tower"}), "mm_vision_tower='somebody/tower'"),
    ],
    ids=lambda v: v[-30:],
)
def test_a_config_that_cannot_be_planned_is_one_line(model: Path, text: str, part: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(CheckpointError) as raised:
        plan(model, "24GB")
    assert part in str(raised.value)
    assert "\n" not in str(raised.value)


def test_json_of_a_plan_is_plain(model: Path) -> None:
    made = plan(model, "24GB", bandwidth=900.0)
    assert json.loads(json.dumps(dataclasses.asdict(made)))["chosen"]["missing"] == 0
    assert made.memory == 24 * GIB
