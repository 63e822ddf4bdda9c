"""Every KV policy under everything that the engine does: batches, chunks, prefix hits, pre-emption, sessions; and how many tokens each holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lmdeploy import GenerationConfig, PytorchEngineConfig, TurbomindEngineConfig, pipeline
from lmdeploy.engine.bill import format_bill
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.kv_cache import KVCache, KVLayout
from lmdeploy.engine.sizing import FORMATS, PoolRequest, bytes_per_token, choose_format, size_pool
from lmdeploy.engine.start import build_engine
from lmdeploy.errors import ConfigError
from lmdeploy.kv_layer import KVFormat
from lmdeploy.messages import EngineOutput, EngineRequest, SamplingParams
from lmdeploy.spec import ModelSpec, RopeSpec
from tests.engine.outlier_model import EMBEDDED, write_outlier_model
from tests.helpers import write_llama

CPU = torch.device("cpu")
POLICIES: tuple[int | str, ...] = (0, 8, "k8v4", 4)
TWENTY = ", ".join(map(str, range(1, 21)))
PROMPTS = [[1, *(5 + (7 * i + 31 * j) % 4000 for j in range(length))] for i, length in enumerate((1, 70, 9, 33, 130, 64))]
LENGTH = 20


def start(folder: Path, policy: int | str, **options: Any) -> Engine:
    small = {"device_type": "cpu", "dtype": "float32", "cache_max_entry_count": 64, "cache_block_seq_len": 16, "max_batch_size": 8, "session_len": 256}
    return build_engine(folder, TurbomindEngineConfig(**{**small, "quant_policy": policy, **options}))


def run(engine: Engine, prompts: list[list[int]], length: int = LENGTH) -> list[list[EngineOutput]]:
    """Greedy answers of all prompts at once."""
    for i, ids in enumerate(prompts):
        engine.add(EngineRequest(request_id=i, token_ids=ids, sampling=SamplingParams(max_new_tokens=length, ignore_eos=True, stop_token_ids=(2,))))
    found: list[list[EngineOutput]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            found[output.request_id].append(output)
        engine.scheduler.check_integrity()
    return found


def tokens(outputs: list[EngineOutput]) -> list[int]:
    return [t for o in outputs for t in o.token_ids]


@pytest.fixture(scope="module", params=[("embedded", 0), ("embedded", 8), ("embedded", "k8v4"), ("embedded", 4), ("outliers", 8), ("outliers", 4)], ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int | str]:
    """A model, without and with centred keys, and a policy."""
    name, policy = request.param
    return (EMBEDDED if name == "embedded" else write_outlier_model(tmp_path_factory.mktemp("policies") / "qwen", 100.0)), policy


@pytest.fixture(scope="module")
def engine(case: tuple[Path, int | str]) -> Iterator[Engine]:
    engine = start(*case)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def truth(engine: Engine) -> list[list[int]]:
    """Each answer computed alone. Prompts share nothing but their first token, so nothing comes from the prefix cache."""
    return [tokens(run(engine, [ids])[0]) for ids in PROMPTS]


# ------------------------------------------------------------------ one text, however the work is cut


def test_a_batch_gives_the_texts_of_each_alone(engine: Engine, truth: list[list[int]]) -> None:
    assert all(len(t) == LENGTH for t in truth) and len({tuple(t) for t in truth}) > 3
    fresh = [[1, 4000 + i, *ids[1:]] for i, ids in enumerate(PROMPTS)]
    alone = [tokens(run(engine, [ids])[0]) for ids in fresh]
    assert [tokens(o) for o in run(engine, PROMPTS)] == truth
    assert [tokens(o) for o in run(engine, fresh)] == alone


def test_a_prefix_hit_gives_the_same_text(engine: Engine, truth: list[list[int]]) -> None:
    (again,) = run(engine, [PROMPTS[4]])
    assert again[0].num_cached >= 112 and tokens(again) == truth[4]
    longer = [*PROMPTS[4], *truth[4][:10]]
    (followed,) = run(engine, [longer])
    assert followed[0].num_cached >= 128 and tokens(followed)[:10] == truth[4][10:], "also where the cached blocks were written while decoding"


def test_chunks_and_preemption_give_the_same_texts(case: tuple[Path, int | str], engine: Engine, truth: list[list[int]]) -> None:
    """Chunks of 24 tokens; 10 blocks of 16 hold the longest answer, or three of those that grow."""
    growing = [[2 + i, *ids[1:15]] for i, ids in enumerate(PROMPTS[1:])]
    alone = [tokens(run(engine, [ids], 45)[0]) for ids in growing]
    small = start(*case, max_prefill_token_num=24, cache_max_entry_count=10, session_len=160)
    assert [tokens(o) for o in run(small, PROMPTS)] == truth
    assert [tokens(o) for o in run(small, growing, 45)] == alone and small.stats().preemptions > 0
    small.close()


@pytest.mark.parametrize("policy", POLICIES)
def test_plain_torch_follows_the_same_format(policy: int | str, tmp_path: Path) -> None:
    """A tiny model, whose every layer matters: the reference and the fast kernels choose the same greedy tokens."""
    folder = write_llama(tmp_path / "m", max_position_embeddings=128)
    answers = []
    for config in (TurbomindEngineConfig, PytorchEngineConfig):
        options: dict[str, Any] = {"dtype": "float32", "device_type": "cpu", "cache_max_entry_count": 32, "cache_block_seq_len": 8, "max_batch_size": 4}
        engine = build_engine(folder, config(quant_policy=policy, **options))
        answers.append([tokens(o) for o in run(engine, [[5, 17, 90, 33, 2, 71], [9]])])
        engine.close()
    assert answers[0] == answers[1]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_conversation_goes_on_where_it_stopped(policy: int | str) -> None:
    config = TurbomindEngineConfig(dtype="float32", max_batch_size=2, session_len=512, cache_max_entry_count=16, quant_policy=policy)
    greedy = GenerationConfig(max_new_tokens=80, do_sample=False)
    with pipeline(str(EMBEDDED), backend_config=config) as pipe:
        assert TWENTY in pipe("Count from 1 to 20.", greedy).text
        session = pipe.chat("My name is Ann.", gen_config=greedy)
        session = pipe.chat("What is my name?", session, gen_config=greedy)
        assert "Ann" in session.response.text


# ------------------------------------------------------------------ how much fits


def spec(head_dim: int) -> ModelSpec:
    """Four KV heads, two layers."""
    return ModelSpec("X", "x", 100, 64, 128, 2, 8, 4, head_dim, 1e-5, 2048, RopeSpec())


@pytest.mark.parametrize(
    ("policy", "head_dim", "times"), [(8, 128, 1.93), ("k8v4", 128, 2.5), (4, 128, 3.5), (4, 64, 3.5), (4, 256, 3.8), (4, 80, 3.6), (8, 96, 1.9)]
)
def test_the_same_bytes_hold_that_many_times_the_tokens(policy: int | str, head_dim: int, times: float) -> None:
    shape, format = spec(head_dim), FORMATS[policy]
    sizes = [size_pool(PoolRequest(0.5, 64, 2048), bytes_per_token(shape, torch.bfloat16, f), 1 << 30).num_blocks for f in (KVFormat(), format)]
    assert sizes[1] / sizes[0] >= times


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_the_pool_takes_the_bytes_that_it_was_sized_with(policy: int | str, head_dim: int) -> None:
    cache = KVCache(spec(head_dim), 5, 16, torch.bfloat16, CPU, KVLayout(FORMATS[policy]))
    counted = 5 * 16 * bytes_per_token(spec(head_dim), torch.bfloat16, FORMATS[policy])
    assert counted <= cache.nbytes < counted + 2 * 4 * 64, "parts are aligned to 64 bytes"
    layer = cache.layers[1]
    held = sum(t.nbytes for t in (layer.key, layer.value, layer.key_scales, layer.value_scales) if t is not None)
    assert 2 * held == counted


def test_the_bill_and_the_info_say_what_the_policy_brings(engine: Engine, case: tuple[Path, int | str]) -> None:
    policy = case[1]
    bill, times = engine.info.memory, {0: 1, 8: 128 / 68, "k8v4": 256 / 104, 4: 128 / 36}[policy]
    assert bill.bytes_per_token_16bit == 2 * 2 * 2 * 64 * 10 and bill.kv_pool >= 64 * 16 * bill.bytes_per_token
    assert bill.kv_policy == {0: "none", 8: "int8", "k8v4": "rotated k8v4", 4: "rotated int4"}[policy]
    line = next(line for line in format_bill(bill).splitlines() if "KV cache" in line)
    assert "64 blocks of 16 = 1024 tokens" in line
    if policy == 0:
        assert "16 bit" not in line and engine.info.kv_quality is None
    else:
        assert bill.bytes_per_token_16bit / bill.bytes_per_token == pytest.approx(times)
        assert f"({bill.kv_policy}: {times:.3g} times what 16 bit would hold)" in line
    assert (engine.info.kv_quality is not None) == (policy in ("k8v4", 4))


# ------------------------------------------------------------------ what can be asked for


@pytest.mark.parametrize(
    ("policy", "rotation", "format"),
    [
        (0, None, KVFormat()),
        (0, False, KVFormat()),
        (8, None, KVFormat("8", "8")),
        (8, True, KVFormat("8", "8", True)),
        ("k8v4", None, KVFormat("8", "4", True)),
        (4, None, KVFormat("4", "4", True)),
        (4, False, KVFormat("4", "4")),
    ],
)
def test_a_policy_names_a_format_and_rotation_is_switchable(policy: int | str, rotation: bool | None, format: KVFormat) -> None:
    assert choose_format(policy, rotation, 64, None) == format


@pytest.mark.parametrize("capability", [None, (8, 6), (8, 0)])
def test_fp8_is_refused_where_the_chip_has_none(capability: tuple[int, int] | None) -> None:
    with pytest.raises(ConfigError, match=r"quant_policy=16 \(fp8\) needs .* 8.9 .*(CPU|8\.6|8\.0); use quant_policy=8 \(int8\)"):
        choose_format(16, None, 64, capability)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (12, 0)])
def test_fp8_is_taken_where_the_chip_has_it(capability: tuple[int, int]) -> None:
    assert choose_format(16, None, 64, capability) == KVFormat("fp8", "fp8")


def test_what_makes_no_sense_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kv_rotation=True has no use with quant_policy=0"):
        choose_format(0, True, 64, None)
    with pytest.raises(ConfigError, match="head_dim=63 is odd; use quant_policy=8"):
        choose_format("k8v4", None, 63, None)
    with pytest.raises(ConfigError, match="fp8"):
        build_engine(write_llama(tmp_path / "m"), TurbomindEngineConfig(quant_policy="fp8", device_type="cpu"))


@pytest.mark.parametrize(
    ("given", "kept"), [("none", 0), ("int8", 8), ("INT4", 4), ("k8v4", "k8v4"), ("K8V4", "k8v4"), ("fp8", 16), ("8", 8), (4.0, 4), (16, 16), ("0", 0)]
)
def test_names_and_numbers_of_the_public_surface_mean_the_same(given: Any, kept: int | str) -> None:
    config = TurbomindEngineConfig(quant_policy=given)
    assert config.quant_policy == kept and config.replace(session_len=5).quant_policy == kept
    assert "quant_policy" in config.given
