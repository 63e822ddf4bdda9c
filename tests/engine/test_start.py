"""Options become decisions, and a folder becomes an engine that answers, holds what it says, and gives everything back."""

from __future__ import annotations

import dataclasses
import gc
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from lmdeploy.config import EngineConfig, PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.memory import taken_bytes
from lmdeploy.engine.sizing import pool_request
from lmdeploy.engine.start import adapt_spec, build_engine, choose_device, resolve_config
from lmdeploy.errors import ConfigError, EngineError, RequestError
from lmdeploy.messages import EngineRequest, SamplingParams
from lmdeploy.spec import ModelSpec, RopeSpec

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
SPEC = ModelSpec("X", "x", 100, 64, 128, 2, 8, 4, 64, 1e-5, 2048, RopeSpec(rotary_dim=64, theta=5e5), dtype="bfloat16")


def small(**options: Any) -> TurbomindEngineConfig:
    """An engine that takes little memory."""
    return TurbomindEngineConfig(
        **{"device_type": "cpu", "cache_max_entry_count": 64, "max_batch_size": 4, "max_prefill_token_num": 256, "dtype": "float32", **options}
    )


def answer(engine: Engine, ids: list[int], count: int, **params: Any) -> list[int]:
    """Tokens of one request."""
    engine.add(EngineRequest(request_id=1, token_ids=ids, sampling=SamplingParams(max_new_tokens=count, **params)))
    out: list[int] = []
    while engine.has_work:
        for output in engine.step():
            assert output.error is None, output.error
            out += output.token_ids
    return out


def test_nothing_is_auto_or_unset_after_resolving() -> None:
    config = resolve_config(EngineConfig(), SPEC, CPU)
    assert (config.device_type, config.max_batch_size, config.session_len, config.max_prefill_token_num) == ("cpu", 32, 2048, 1024)
    assert config.dtype in ("bfloat16", "float32") and config.cpu_threads == torch.get_num_threads()


def test_a_resolved_config_is_of_the_users_class_and_keeps_what_was_given() -> None:
    given = PytorchEngineConfig(max_batch_size=7, session_len=100, max_prefill_token_num=50, dtype="float32", cpu_threads=1)
    config = resolve_config(given, SPEC, CPU)
    assert config.backend == "pytorch"
    assert (config.max_batch_size, config.session_len, config.max_prefill_token_num, config.dtype, config.cpu_threads) == (7, 100, 50, "float32", 1)
    assert given.device_type == "auto", "the user's own object stays as it was"


@pytest.mark.parametrize(("amx", "avx", "dtype"), [(True, True, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")])
def test_cpu_uses_bfloat16_only_where_the_processor_multiplies_it(monkeypatch: pytest.MonkeyPatch, amx: bool, avx: bool, dtype: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    assert resolve_config(EngineConfig(), SPEC, CPU).dtype == dtype


@pytest.mark.parametrize(("stored", "dtype"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "float16")])
def test_cuda_uses_the_checkpoints_16_bit_type(monkeypatch: pytest.MonkeyPatch, stored: Any, dtype: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    config = resolve_config(EngineConfig(), dataclasses.replace(SPEC, dtype=stored), CUDA)
    assert (config.dtype, config.max_batch_size, config.max_prefill_token_num, config.device_type) == (dtype, 256, 8192, "cuda")


def test_float16_on_cpu_is_obeyed_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_config(EngineConfig(dtype="float16"), SPEC, CPU).dtype == "float16"
    assert "float16 is slow on CPU" in caplog.text


def test_a_session_longer_than_the_model_is_accepted_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_config(EngineConfig(session_len=5000), SPEC, CPU).session_len == 5000
    assert "session_len=5000 is beyond the 2048 positions" in caplog.text and "rope_scaling_factor" in caplog.text
    caplog.clear()
    config = EngineConfig(session_len=5000, rope_scaling_factor=2.0)
    resolve_config(config, adapt_spec(SPEC, config), CPU)
    assert "beyond" not in caplog.text


def test_decisions_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lmdeploy"):
        resolve_config(EngineConfig(), SPEC, CPU)
    assert "max_batch_size = 32" in caplog.text and "session_len = 2048" in caplog.text and "device_type = cpu" in caplog.text


def test_a_device_that_is_not_there_is_an_error_and_no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device(EngineConfig()) == choose_device(EngineConfig(device_type="cpu")) == CPU
    with pytest.raises(ConfigError, match="device_type='cuda', but torch finds no usable CUDA device"):
        choose_device(EngineConfig(device_type="cuda"))


def test_rope_scaling_and_logn_change_the_spec() -> None:
    spec = adapt_spec(SPEC, EngineConfig(rope_scaling_factor=2.5, use_logn_attn=True))
    assert (spec.rope.kind, spec.rope.factor, spec.rope.original_max_position) == ("dynamic", 2.5, 2048)
    assert (spec.rope.theta, spec.rope.rotary_dim, spec.use_logn) == (5e5, 64, True)
    assert adapt_spec(SPEC, EngineConfig()) == SPEC
    yarn = dataclasses.replace(SPEC, rope=RopeSpec("yarn"))
    with pytest.raises(ConfigError, match="rope_scaling_factor=2.0 cannot be combined with the model's own 'yarn' rope"):
        adapt_spec(yarn, EngineConfig(rope_scaling_factor=2.0))


def test_only_a_default_share_on_cpu_is_capped_and_only_a_default_session_shortened() -> None:
    def request(config: EngineConfig, device: torch.device = CPU) -> Any:
        return pool_request(config, resolve_config(config, SPEC, device))

    assert request(EngineConfig(max_batch_size=3)).cap_blocks == 3 * 32
    assert request(EngineConfig(cache_max_entry_count=0.8)).cap_blocks is None
    assert request(EngineConfig(dtype="float16"), CUDA).cap_blocks is None
    assert not request(EngineConfig()).keep_session and request(EngineConfig(session_len=2048)).keep_session


def test_the_embedded_model_starts_and_says_what_it_is(model_folder: Path) -> None:
    engine = build_engine(model_folder, small(session_len=512))
    info = engine.info
    assert (info.session_len, info.vocab_size, info.max_batch_size, info.dtype) == (512, 5120, 4, "float32")
    assert info.memory.num_blocks == 64 and info.memory.kv_pool == 64 * 64 * info.memory.bytes_per_token
    assert info.memory.weights == pytest.approx(2 * 39e6, rel=0.05) and info.kernels and 0 < info.start_seconds < 60
    assert len(answer(engine, [1, 20, 30], 5)) == 5
    engine.close()


def test_both_backends_give_the_same_greedy_tokens(model_folder: Path) -> None:
    tokens = []
    for config in (small(), PytorchEngineConfig(device_type="cpu", cache_max_entry_count=64, max_batch_size=4, dtype="float32")):
        engine = build_engine(model_folder, config)
        tokens.append(answer(engine, [1, 350, 14, 309, 1669], 24, ignore_eos=True, stop_token_ids=(2,)))
        engine.close()
    assert tokens[0] == tokens[1] and len(tokens[0]) == 24


def test_two_engines_live_in_one_process_and_close_gives_everything_back(model_folder: Path) -> None:
    first = build_engine(model_folder, small())
    alone = answer(first, [1, 350, 14, 309], 8)
    second = build_engine(model_folder, small(max_prefill_token_num=16, cache_block_seq_len=16, cache_max_entry_count=2000))
    pool = second.info.memory.kv_pool
    first.add(EngineRequest(request_id=5, token_ids=[1, 9, 9], sampling=SamplingParams(max_new_tokens=4)))
    first.step()
    assert answer(second, [1, 350, 14, 309], 8) == alone
    assert answer(first, [1, 350, 14, 309], 8)[-8:]
    before = taken_bytes(CPU)
    second.close()
    second.close()
    gc.collect()
    assert before - taken_bytes(CPU) > 0.95 * (pool + second.info.memory.weights)
    with pytest.raises(EngineError, match="closed"):
        answer(second, [1], 1)
    assert answer(first, [1, 350, 14, 309], 8) == alone
    first.close()


def test_a_small_pool_shortens_a_default_session_and_refuses_only_what_cannot_fit(model_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = build_engine(model_folder, small(cache_max_entry_count=2))
    assert engine.info.session_len == 128 and "session_len is 128 instead of 2048" in engine.info.memory.note
    assert "session_len is 128" in caplog.text
    engine.close()
    engine = build_engine(model_folder, small(cache_max_entry_count=2, session_len=1000))
    assert engine.info.session_len == 1000 and "longer requests are refused" in engine.info.memory.note
    assert len(answer(engine, [1] * 100, 20)) == 20
    with pytest.raises(RequestError, match="200 tokens .* 128"):
        answer(engine, [1] * 200, 20)
    assert len(answer(engine, [1] * 5, 3)) == 3
    engine.close()


def test_a_share_without_room_for_a_block_is_refused_at_the_start(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"cache_max_entry_count=1e-08 of the .* takes .* use at least"):
        build_engine(model_folder, small(cache_max_entry_count=1e-8))


def test_more_blocks_than_memory_are_refused_at_the_start(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match="cache_max_entry_count=90000000 blocks of 64 tokens need .* use at most"):
        build_engine(model_folder, small(cache_max_entry_count=90_000_000))


def test_random_weights_need_only_a_config(tmp_path: Path, model_folder: Path) -> None:
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    engine = build_engine(tmp_path, small(random_weights=True))
    assert len(answer(engine, [1, 2, 3], 4)) == 4
    engine.close()


def test_threads_are_set_only_when_given(model_folder: Path) -> None:
    before = torch.get_num_threads()
    build_engine(model_folder, small()).close()
    assert torch.get_num_threads() == before
    try:
        build_engine(model_folder, small(cpu_threads=1)).close()
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
