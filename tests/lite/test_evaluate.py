"""The scores against transformers, and what the proof does with folders that are good, broken or not to be run here."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from lmdeploy.config import TurbomindEngineConfig
from lmdeploy.engine.engine import Engine
from lmdeploy.errors import CheckpointError
from lmdeploy.lite import auto_awq, evaluate
from lmdeploy.lite.datasets import embedded_text
from lmdeploy.lite.evaluate import engine_config, hidden_states, measure, opened, quantises_activations, score, speed
from lmdeploy.lite.report import Report
from lmdeploy.lite.scores import Head, Reference
from lmdeploy.spec import load_spec
from lmdeploy.text.tokenizer import Tokenizer
from tests.helpers import write_llama
from tests.lite.unpacking import dequantised, read_folder

Tensor = torch.Tensor
FLOAT32 = TurbomindEngineConfig(dtype="float32", device_type="cpu")


@dataclass(frozen=True)
class Options:
    """What `measure` asks of a command's options."""

    dtype: str = "float32"
    device: str = "cpu"


@pytest.fixture(scope="module")
def windows(model_folder: Path) -> list[list[int]]:
    """Real text of the embedded model, in windows of different lengths."""
    ids = Tokenizer(model_folder).encode(embedded_text()[-6000:])
    return [ids[-500:-250], ids[-250:-100], ids[-100:]]


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "tiny", num_hidden_layers=3)


TINY_WINDOWS = [[(7 * i + i * i) % 131 for i in range(100)], [(5 * i) % 131 for i in range(40)]]


@pytest.fixture(scope="module")
def quantised(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, rounded to 4 bits."""
    folder = tmp_path_factory.mktemp("evaluate") / "rounded"
    auto_awq(str(model_folder), work_dir=str(folder), calib_dataset="embedded", calib_samples=0, eval_tokens=0)
    return folder


def as_llama(folder: Path) -> LlamaForCausalLM:
    """The InternLM2 checkpoint in transformers' own code: renamed, and q, k and v taken apart; 4-bit layers unpacked by the independent reader."""
    config = json.loads((folder / "config.json").read_text())
    quantised = "quantization_config" in config
    tensors = read_folder(folder)
    heads, kv_heads, layers = config["num_attention_heads"], config["num_key_value_heads"], config["num_hidden_layers"]
    dim, group = config["hidden_size"] // heads, heads // kv_heads

    def weight(name: str) -> Tensor:
        return dequantised(tensors, name, 128) if quantised else tensors[f"{name}.weight"].float()

    state = {
        "model.embed_tokens.weight": tensors["model.tok_embeddings.weight"].float(),
        "model.norm.weight": tensors["model.norm.weight"].float(),
        "lm_head.weight": tensors["output.weight"].float(),
    }
    for layer in range(layers):
        old, new = f"model.layers.{layer}", f"model.layers.{layer}"
        state[f"{new}.input_layernorm.weight"] = tensors[f"{old}.attention_norm.weight"].float()
        state[f"{new}.post_attention_layernorm.weight"] = tensors[f"{old}.ffn_norm.weight"].float()
        for theirs, ours in (("wo", "o_proj"),):
            state[f"{new}.self_attn.{ours}.weight"] = weight(f"{old}.attention.{theirs}")
        for theirs, ours in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
            state[f"{new}.mlp.{ours}.weight"] = weight(f"{old}.feed_forward.{theirs}")
        qkv = weight(f"{old}.attention.wqkv").view(kv_heads, group + 2, dim, -1)
        for ours, part in (("q_proj", qkv[:, :group]), ("k_proj", qkv[:, -2]), ("v_proj", qkv[:, -1])):
            state[f"{new}.self_attn.{ours}.weight"] = part.reshape(-1, qkv.shape[-1])
    llama = LlamaConfig(
        vocab_size=config["vocab_size"], hidden_size=config["hidden_size"], intermediate_size=config["intermediate_size"], num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, rms_norm_eps=config["rms_norm_eps"], tie_word_embeddings=False,
        max_position_embeddings=config["max_position_embeddings"], rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
    )  # fmt: skip
    model = LlamaForCausalLM(llama).eval()
    model.load_state_dict(state)
    return model


@torch.inference_mode()
def by_transformers(folders: list[Path], windows: list[list[int]]) -> tuple[float, float, float, float]:
    """Perplexities of two folders, KL of the first to the second, share of equal top tokens: in the plainest way, in float64."""
    models = [as_llama(folder) for folder in folders]
    losses: tuple[list[Tensor], list[Tensor]] = ([], [])
    kls, same = [], []
    for window in windows:
        first, second = (torch.log_softmax(model(torch.tensor([window])).logits[0, :-1].double(), -1) for model in models)
        for found, logprobs in zip(losses, (first, second), strict=True):
            found.append(-logprobs[torch.arange(len(window) - 1), torch.tensor(window[1:])])
        kls.append((first.exp() * (first - second)).sum(-1))
        same.append(first.argmax(-1) == second.argmax(-1))
    perplexities = [math.exp(float(torch.cat(found).mean())) for found in losses]
    return perplexities[0], perplexities[1], float(torch.cat(kls).mean()), float(torch.cat(same).double().mean())


def reference_of(folder: Path, windows: list[list[int]], config: TurbomindEngineConfig = FLOAT32) -> Reference:
    config = engine_config(config, windows, load_spec(folder))
    with opened(folder, config) as engine:
        return Reference(Head(folder, config), hidden_states(engine, windows))


def test_scores_are_those_of_transformers(quantised: Path, model_folder: Path, windows: list[list[int]]) -> None:
    wanted = by_transformers([model_folder, quantised], windows)
    reference = reference_of(model_folder, windows)
    with opened(quantised, engine_config(FLOAT32, windows, load_spec(quantised))) as engine:
        found = score(engine, windows, reference)
    assert found.tokens == sum(map(len, windows)) - len(windows)
    assert found.reference_perplexity == pytest.approx(wanted[0], rel=1e-3)
    assert found.perplexity == pytest.approx(wanted[1], rel=1e-3)
    assert found.kl == pytest.approx(wanted[2], rel=1e-3)
    assert found.top1 == pytest.approx(wanted[3], abs=1e-3)
    assert 0.005 < wanted[2] < 0.5, "the models differ by as much as 4 bits make"


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_does_not_diverge_from_itself(tmp_path: Path, tied: bool) -> None:
    """The head alone gives the whole model's logits, to the last bit."""
    folder = write_llama(tmp_path, tie_word_embeddings=tied)
    reference = reference_of(folder, TINY_WINDOWS)
    with opened(folder, engine_config(FLOAT32, TINY_WINDOWS, load_spec(folder))) as engine:
        found = score(engine, TINY_WINDOWS, reference)
    assert (found.kl, found.kl_p99, found.top1, found.ratio) == (0.0, 0.0, 1.0, 1.0)


def test_few_rows_at_a_time_give_the_same_scores(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for limit in (evaluate.LOGIT_BYTES, 1):
        monkeypatch.setattr(evaluate, "LOGIT_BYTES", limit)
        monkeypatch.setattr(evaluate, "MIN_STEP", 16)
        config = engine_config(FLOAT32, TINY_WINDOWS, load_spec(tiny))
        assert config.max_prefill_token_num == (1024 if limit > 1 else 16)
        with opened(tiny, config) as engine:
            found.append(score(engine, TINY_WINDOWS))
    assert found[0].perplexity == pytest.approx(found[1].perplexity, rel=1e-5)
    assert found[0].kl is None, "nothing to compare with"


def test_a_large_vocabulary_bounds_the_step_and_a_short_model_the_session(tmp_path: Path) -> None:
    spec = load_spec(write_llama(tmp_path, vocab_size=400))
    config = engine_config(FLOAT32, [[1] * 100], dataclasses.replace(spec, vocab_size=92544, max_position=300))
    assert config.max_prefill_token_num == 704
    assert evaluate.LOGIT_BYTES >= 704 * 92544 * 4
    assert config.session_len == 300


@pytest.mark.parametrize("policy", [8, 4])
def test_the_kv_policy_is_what_the_later_tokens_are_computed_with(tiny: Path, policy: int) -> None:
    reference = reference_of(tiny, TINY_WINDOWS)
    config = engine_config(FLOAT32.replace(quant_policy=policy), TINY_WINDOWS, load_spec(tiny))
    with opened(tiny, config) as engine:
        found = score(engine, TINY_WINDOWS, reference)
    low, high = {8: (1e-7, 1e-2), 4: (1e-4, 1.0)}[policy]
    assert found.kl is not None
    assert low < found.kl < high


@pytest.fixture
def engine(tiny: Path) -> Iterator[Engine]:
    with opened(tiny, engine_config(FLOAT32, TINY_WINDOWS, load_spec(tiny))) as found:
        yield found


def test_speed_is_what_the_clock_says(engine: Engine) -> None:
    start = time.perf_counter()
    found = speed(engine, TINY_WINDOWS[0], seconds=60, most=3)
    seconds = time.perf_counter() - start
    assert (found.runs, found.steps, found.prompt_tokens) == (3, 3 * (evaluate.ANSWER - 1), 100)
    at_least = found.runs / 2 * found.prompt_tokens / found.prefill + found.steps / 2 / found.decode  # half of them take the median or more
    assert at_least < seconds
    assert found.prefill > found.decode > 0


def test_speed_of_a_slow_model_takes_one_prompt_and_one_step(engine: Engine) -> None:
    found = speed(engine, TINY_WINDOWS[0], seconds=0)
    assert (found.runs, found.steps) == (1, 1)
    assert score(engine, TINY_WINDOWS).tokens == 138, "the request that was broken off is gone"


def empty_report() -> Report:
    return Report(model="m", work_dir="w", method="AWQ", calibration="c", samples=1, seqlen=2, group_size=128, search_scale=False)


def test_measure_fills_the_report(quantised: Path, model_folder: Path, windows: list[list[int]]) -> None:
    report = empty_report()
    measure(report, model_folder, quantised, windows, Options())
    assert report.perplexity_before is not None and report.perplexity_after is not None and report.kl is not None and report.top1 is not None
    assert 1 < report.perplexity_before < 20 and 0.9 < report.perplexity_after / report.perplexity_before < 1.1
    assert 0 < report.kl < 0.5 and 0.7 < report.top1 < 1
    assert report.evaluated_tokens == sum(map(len, windows)) - len(windows)
    assert report.evaluated_on == "float32 on cpu"
    assert min(report.prefill_before or 0, report.prefill_after or 0, report.decode_before or 0, report.decode_after or 0) > 1
    assert report.kl_activations is None, "4-bit weights of AWQ have 16-bit activations"


def test_without_windows_nothing_is_measured() -> None:
    report = empty_report()
    measure(report, Path("nowhere"), Path("nowhere"), [], Options())
    assert report.perplexity_before is None
    assert "eval_tokens=0" in report.perplexity_note


def test_a_folder_that_cannot_be_run_is_a_note_and_no_error(tiny: Path, tmp_path: Path) -> None:
    report = empty_report()
    (tmp_path / "empty").mkdir()
    measure(report, tiny, tmp_path / "empty", TINY_WINDOWS, Options())
    assert "empty" in report.perplexity_note
    assert report.perplexity_after is None and report.kl is None


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_broken_model_is_refused(tiny: Path, tmp_path: Path, value: float) -> None:
    """NaN logits, and logits that are all alike where the model before knew its text."""
    broken = write_llama(tmp_path / "broken", num_hidden_layers=3)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"].fill_(value)
    save_file(tensors, broken / "model.safetensors")
    text = _own_text(tiny)
    with pytest.raises(CheckpointError, match="the quantised model is broken: perplexity"):
        measure(empty_report(), tiny, broken, [text], Options())


def _own_text(folder: Path) -> list[int]:
    """60 tokens that the model itself says, so that its perplexity of them is low."""
    from lmdeploy.messages import SamplingParams

    with opened(folder, engine_config(FLOAT32, [[1] * 64], load_spec(folder))) as engine:
        outputs = evaluate._answers(engine, [3], SamplingParams(max_new_tokens=60, ignore_eos=True))
        return [3, *(token for output in outputs for token in output.token_ids)]


def test_weights_made_for_8_bit_activations_are_recognised(tiny: Path) -> None:
    assert not quantises_activations(tiny)
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "smooth_quant", "quant_dtype": "int8"}}))
    assert quantises_activations(tiny)
