"""What a started engine says of its memory is what the planner said before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.engine.start import build_engine
from lmdeploy.messages import EngineInfo
from lmdeploy.plan.machines import CPU_OTHER, cpu_number_bytes
from lmdeploy.plan.options import PlanConfig
from lmdeploy.plan.plan import Plan, make_plan
from tests.models.test_weight_bytes import SMALL
from tests.vision.folders import LAYOUTS, write

CONFIGS = Path(__file__).resolve().parents[2] / "../shared/data/configs"
STORIES = Path(__file__).resolve().parents[2] / "../shared/models/stories260K-llama"


def started(folder: Path, **options: Any) -> EngineInfo:
    """Facts of an engine that was really started."""
    engine = build_engine(folder, TurbomindEngineConfig(device_type="cpu", dtype="bfloat16", cpu_threads=1, **options))
    try:
        return engine.info
    finally:
        engine.close()


def planned(folder: Path, info: EngineInfo, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Plan:
    """The plan for the memory that the engine found: what it takes and what it left. The test's own process is larger than a server's: `other` is told."""
    memory = info.memory.free + info.memory.total
    monkeypatch.setattr("lmdeploy.plan.machines.CPU_OTHER", info.memory.other)
    monkeypatch.setattr("lmdeploy.plan.machines.host_free", lambda: memory)
    config = TurbomindEngineConfig(dtype="bfloat16", **{k: v for k, v in options.items() if k != "random_weights"})
    return make_plan(str(folder), config, PlanConfig(bandwidth=30.0))


@pytest.fixture(params=["embedded", "stories260K", "random"])
def folder(request: pytest.FixtureRequest, model_folder: Path, tmp_path: Path) -> Path:
    if request.param == "embedded":
        return model_folder
    if request.param == "stories260K":
        if not STORIES.is_dir():
            pytest.skip("shared/models is not beside the repository")
        return STORIES
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    return tmp_path


@pytest.mark.parametrize("options", [{"cache_max_entry_count": 0.01}, {"cache_max_entry_count": 0.01, "quant_policy": 8}, {"max_batch_size": 2}], ids=str)
def test_the_plan_is_what_the_engine_measures(folder: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**options, "random_weights": not any(folder.glob("*.safetensors"))}
    info = started(folder, **options)
    chosen = planned(folder, info, monkeypatch, **options).chosen
    bill = info.memory
    assert chosen.weight_bytes == bill.weights
    assert chosen.bytes_per_token == bill.bytes_per_token
    assert chosen.kv == bill.kv_policy
    assert chosen.session_len == bill.session_len
    assert chosen.num_blocks == pytest.approx(bill.num_blocks, rel=0.02)
    assert chosen.kv_pool == pytest.approx(bill.kv_pool, rel=0.02)
    assert chosen.workspace == pytest.approx(bill.workspace, rel=0.05)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_eyes_are_counted_as_the_engine_loads_them(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(layout, tmp_path)
    options: dict[str, Any] = {"cache_max_entry_count": 20, "max_batch_size": 2}
    info = started(tmp_path, **options)
    made = planned(tmp_path, info, monkeypatch, **options)
    assert made.chosen.weight_bytes == info.memory.weights
    assert made.chosen.num_blocks == info.memory.num_blocks == 20
    assert made.parts[-1].part == "vision"


def test_the_usual_rest_of_a_process_is_about_what_it_is(model_folder: Path) -> None:
    from tests.plan.process import bill_of_a_fresh_process

    assert bill_of_a_fresh_process(model_folder)["other"] == pytest.approx(CPU_OTHER, rel=0.5)


def test_numbers_of_auto_are_the_engines(model_folder: Path) -> None:
    from lmdeploy.engine.start import choose_device, resolve_config
    from lmdeploy.spec import load_spec

    config = TurbomindEngineConfig(device_type="cpu")
    resolved = resolve_config(config, load_spec(model_folder), choose_device(config))
    assert cpu_number_bytes() == {"bfloat16": 2, "float32": 4}[resolved.dtype]


#: bills of engines that were started on an H200 (torch 2.11.0+cu130, 2026-11-28, random weights, cache_max_entry_count 0.4):
#: model, options, weights, workspace, other, blocks
ON_H200 = [
    ("internlm2_5-1_8b-chat", {}, 3778220032, 827590656, 832956416, 9200),
    ("internlm2_5-1_8b-chat", {"model_format": "awq", "quant_policy": 8}, 1548685312, 827590656, 806119424, 18121),
    ("internlm2_5-7b-chat", {}, 15475417088, 1297352704, 783341568, 6322),
    ("internlm2_5-7b-chat", {"model_format": "awq"}, 5170012160, 1297352704, 812701696, 6812),
]


@pytest.mark.skipif(not CONFIGS.is_dir(), reason="shared/data/configs is not beside the repository")
@pytest.mark.parametrize(("model", "options", "weights", "workspace", "other", "blocks"), ON_H200, ids=str)
def test_engines_on_an_h200_had_the_bill_that_is_planned(model: str, options: dict[str, Any], weights: int, workspace: int, other: int, blocks: int) -> None:
    made = make_plan(str(CONFIGS / model), TurbomindEngineConfig(cache_max_entry_count=0.4, **options), PlanConfig(gpu="h200")).chosen
    assert made.weight_bytes == weights
    assert made.workspace == workspace
    assert made.other == pytest.approx(other, rel=0.05)
    assert made.num_blocks == pytest.approx(blocks, rel=0.01)
