"""Weights in place: dropped, brought back, replaced; addresses stay, and what cannot be read to the end changes nothing."""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmdeploy import GenerationConfig, TurbomindEngineConfig, pipeline
from lmdeploy.checkpoint.source import open_source
from lmdeploy.engine.client import EngineThread
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.start import build_engine
from lmdeploy.engine.weights import Facts, Weights
from lmdeploy.errors import CheckpointError, ConfigError, EngineError, RequestError
from lmdeploy.layers.build import reload
from lmdeploy.messages import Order
from lmdeploy.models.decoder import Decoder
from lmdeploy.spec import load_spec
from tests.engine.test_process import Inbox, long_request, request
from tests.helpers import load_model, write_llama

GREEDY = GenerationConfig(max_new_tokens=12, ignore_eos=True)
CONFIG = TurbomindEngineConfig(dtype="float32", session_len=512, max_batch_size=4, cache_max_entry_count=64, cpu_threads=1, max_prefill_token_num=128)


def weights_of(model: Decoder, folder: Path) -> Weights:
    def facts_of(other: Path) -> Facts:
        return Facts.of(load_spec(other), open_source(other))

    return Weights(model.tensors, lambda other: model.load(open_source(other), again=True), facts_of, folder)


def contents(model: Decoder) -> list[torch.Tensor]:
    return [t.clone() for t in model.tensors()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}], ids=["plain", "tied"])
def test_new_weights_come_to_the_same_addresses(changes: dict[str, object], tmp_path: Path) -> None:
    first, second = write_llama(tmp_path / "a", **changes), write_llama(tmp_path / "b", seed=1, **changes)
    model, other = load_model(first), load_model(second)
    addresses = [t.data_ptr() for t in model.tensors()]
    weights = weights_of(model, first)
    weights.update(second)
    assert [t.data_ptr() for t in model.tensors()] == addresses
    assert same(contents(model), contents(other))


def test_a_quantised_head_is_made_again(tmp_path: Path) -> None:
    first, second = write_llama(tmp_path / "a", hidden_size=64), write_llama(tmp_path / "b", seed=1, hidden_size=64)
    model, other = load_model(first, head_bits=8), load_model(second, head_bits=8)
    weights_of(model, first).update(second)
    assert same(contents(model), contents(other))


def test_level_2_empties_every_storage_and_reads_what_was_served_last(tmp_path: Path) -> None:
    first, second = write_llama(tmp_path / "a"), write_llama(tmp_path / "b", seed=1)
    model, other = load_model(first), load_model(second)
    weights = weights_of(model, first)
    weights.update(second)
    weights.sleep(2)
    weights.sleep(1)
    assert {t.untyped_storage().nbytes() for t in model.tensors()} == {0}
    weights.wake()
    weights.wake()
    assert same(contents(model), contents(other))


def test_level_1_leaves_weights_in_host_memory_where_they_are(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "a")
    model = load_model(folder)
    before = contents(model)
    weights = weights_of(model, folder)
    weights.sleep(1)
    assert same(contents(model), before)
    weights.sleep(2)
    assert {t.untyped_storage().nbytes() for t in model.tensors()} == {0}


def test_what_breaks_off_while_it_is_read_brings_the_old_ones_back(tmp_path: Path) -> None:
    first, second = write_llama(tmp_path / "a"), write_llama(tmp_path / "b", seed=1)
    model = load_model(first)
    before = contents(model)
    calls: list[Path] = []

    def load(folder: Path) -> None:
        calls.append(folder)
        if folder == second:  # half of them, then the disk fails
            for part in list(model._parts())[:3]:
                reload(part, lambda part=part: part.load(open_source(second)))  # type: ignore[misc]
            raise OSError(5, "Input/output error")
        model.load(open_source(folder), again=True)

    weights = Weights(model.tensors, load, lambda f: Facts.of(load_spec(f), open_source(f)), first)
    with pytest.raises(CheckpointError, match="Input/output"):
        weights.update(second)
    assert calls == [second, first] and same(contents(model), before)
    shutil.rmtree(first)
    with pytest.raises(EngineError, match="half read"):
        weights.update(second)


def test_other_floating_types_are_cast_and_pytorch_files_are_not_taken(tmp_path: Path) -> None:
    first, second = write_llama(tmp_path / "a"), write_llama(tmp_path / "b", seed=1)
    model = load_model(first)
    tensors = {name: t.bfloat16() for name, t in load_file(second / "model.safetensors").items()}
    save_file(tensors, second / "model.safetensors")
    weights = weights_of(model, first)
    weights.update(second)
    assert torch.equal(model.embedding.weight, tensors["model.embed_tokens.weight"].float())
    torch.save(tensors, second / "pytorch_model.bin")
    (second / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors"):
        weights.update(second)


def test_memory_that_is_not_there_leaves_them_asleep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_llama(tmp_path / "a")
    model = load_model(folder)
    before = contents(model)
    weights = weights_of(model, folder)
    weights.sleep(2)
    whole = weights._dropped
    weights._dropped = [*whole[:-1], (whole[-1][0], 1 << 60)]
    with pytest.raises(ConfigError, match="no memory for the weights"):
        weights.wake()
    weights._dropped = whole
    assert {t.untyped_storage().nbytes() for t in model.tensors()} == {0}
    weights.wake()
    assert same(contents(model), before)


def test_requests_behind_an_order_wait_and_can_be_aborted(model_folder: Path) -> None:
    thread, inbox = EngineThread(lambda: build_engine(model_folder, CONFIG)), Inbox()
    thread.start(inbox)
    try:
        thread.submit(long_request(1))
        slept = thread.obey(Order(action="sleep", drain_seconds=60))
        thread.submit(request(2))
        thread.submit(request(3, n=2))
        woken = thread.obey(Order(action="wake"))
        thread.submit(request(4))
        thread.abort(3)
        assert [inbox.final(3, i).finish_reason for i in (0, 1)] == ["abort", "abort"]
        slept.result(60)
        assert inbox.final(1).finish_reason == "length"
        assert inbox.final(2).error_code == "asleep"
        woken.result(60)
        assert inbox.final(4).finish_reason in ("stop", "length")
        assert thread.stats().cached_tokens == 0, "what was computed before is forgotten"
    finally:
        thread.close()


def test_waking_an_engine_that_works_ends_nobodys_answer(model_folder: Path) -> None:
    thread, inbox = EngineThread(lambda: build_engine(model_folder, CONFIG)), Inbox()
    thread.start(inbox)
    try:
        thread.submit(long_request(1))
        inbox.wait(lambda: (1, 0) in inbox.tokens)
        for tags in ((), ("weights",), ("kv_cache",)):
            thread.obey(Order(action="wake", tags=tags)).result(60)
        assert (1, 0) not in inbox.last, "it did not wait for the answer's end either"
        assert inbox.final(1).finish_reason == "length"
    finally:
        thread.close()


def test_orders_of_many_threads_leave_the_frontend_with_what_the_engine_is(model_folder: Path) -> None:
    with pipeline(str(model_folder), backend_config=CONFIG) as pipe:
        orders = [lambda: pipe.sleep(1), pipe.wakeup, lambda: pipe.wakeup(["kv_cache"]), lambda: pipe.sleep(2)]
        for _ in range(10):
            with ThreadPoolExecutor(4) as pool:
                for done in [pool.submit(order) for order in orders * 2]:
                    done.result(60)
            assert pipe.frontend.asleep == pipe.frontend.client._engine._asleep  # type: ignore[attr-defined]


def test_an_order_that_cannot_be_carried_out_is_its_senders_alone(model_folder: Path, tmp_path: Path) -> None:
    thread, inbox = EngineThread(lambda: build_engine(model_folder, CONFIG)), Inbox()
    thread.start(inbox)
    with pytest.raises(CheckpointError):
        thread.obey(Order(action="update_weights", path=str(tmp_path))).result(60)
    thread.submit(request(1))
    assert inbox.final(1).finish_reason in ("stop", "length")
    thread.submit(long_request(2))
    inbox.wait(lambda: (2, 0) in inbox.tokens)
    left: Future[None] = thread.obey(Order(action="sleep", drain_seconds=600))
    thread.close()
    with pytest.raises(EngineError, match="closed"):
        left.result(1)
    with pytest.raises(EngineError):
        thread.obey(Order(action="wake"))


def test_a_quantised_cache_gets_the_key_centres_of_the_new_weights(model_folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model_folder, tmp_path / "other"))
    for path in other.glob("*.safetensors"):
        tensors = {name: t * 1.1 if t.dim() == 2 else t for name, t in load_file(path).items()}
        path.unlink()
        save_file(tensors, path, {"format": "pt"})

    def centers(engine: Engine) -> list[torch.Tensor | None]:
        return [layer.key_center for layer in engine._executor._runner.kv.layers]  # type: ignore[attr-defined]

    config = CONFIG.replace(quant_policy=8)
    engine, fresh = build_engine(model_folder, config), build_engine(other, config)
    assert any(c is not None for c in centers(fresh))
    engine.obey(Order(action="update_weights", path=str(other)))
    for mine, expected in zip(centers(engine), centers(fresh), strict=True):
        assert (mine is None) == (expected is None)
        assert mine is None or expected is None or torch.equal(mine, expected)
    engine.close()
    fresh.close()


def test_a_pipeline_sleeps_and_wakes(model_folder: Path) -> None:
    with pipeline(str(model_folder), backend_config=CONFIG) as pipe:
        text = pipe("Tell me of cats.", gen_config=GREEDY).text
        for level in (1, 2):
            pipe.sleep(level)
            with pytest.raises(EngineError, match="sleeps"):
                pipe("Tell me of cats.", gen_config=GREEDY)
            pipe.wakeup(["weights"])
            pipe.wakeup()
            assert pipe("Tell me of cats.", gen_config=GREEDY).text == text
        with pytest.raises(RequestError, match="level"):
            pipe.sleep(3)
        with pytest.raises(RequestError, match="tags"):
            pipe.wakeup(["everything"])
        pipe.update_weights(model_folder)
        assert pipe("Tell me of cats.", gen_config=GREEDY).text == text
