"""The layer stream computes what the model computes, sees what every linear layer is given, and smoothing changes no model's results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lmdeploy.checkpoint.source import open_source
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.layers.build import BuildContext
from lmdeploy.lite.awq import LayerWeights, LinearWeight, Rounding, smooth_layer
from lmdeploy.lite.calibrate import InputStats, LayerStream, Recorder
from lmdeploy.lite.plan import LayerPlan, plan_layers
from lmdeploy.models.registry import model_class
from lmdeploy.parallel import Parallel
from lmdeploy.spec import load_spec
from tests.helpers import Harness, load_model, write_folder, write_internlm2, write_llama
from tests.parity.families import FAMILIES, make_reference

Tensor = torch.Tensor
META = torch.device("meta")


def windows_of(vocab_size: int, count: int = 5, length: int = 70) -> Tensor:
    return torch.randint(3, vocab_size, (count, length), generator=torch.Generator().manual_seed(1))


def stream_of(folder: Path, windows: Tensor, *, batch_size: int = 2, group: int = 0) -> LayerStream:
    spec = load_spec(folder)
    stream = LayerStream(spec, open_source(folder), Recorder(REFERENCE, group, with_gram=True), torch.device("cpu"), torch.float32)
    stream.embed(windows, batch_size)
    return stream


def plans_of(folder: Path, group: int = 4) -> tuple[LayerPlan, ...]:
    spec = load_spec(folder)
    skeleton = model_class(spec)(BuildContext(spec, Parallel(), REFERENCE, torch.float32, META))
    return plan_layers(skeleton, open_source(folder), group)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 99])
def test_the_stream_ends_with_the_hidden_states_of_the_model(tmp_path: Path, batch_size: int) -> None:
    folder = write_internlm2(tmp_path, num_hidden_layers=3)
    windows = windows_of(131)
    stream = stream_of(folder, windows, batch_size=batch_size)
    for index in range(3):
        assert len(list(stream.run(index))) == stream.num_batches
    model = load_model(folder)
    harness = Harness(model, max_rows=400)
    for window, hidden in zip(windows.tolist(), stream.hidden, strict=True):
        expected = harness.step([(len(harness.sequences), window)])
        model.norm.forward(hidden.contiguous(), out := torch.empty_like(hidden))
        torch.testing.assert_close(model.logits(out), next(iter(expected.values())), atol=2e-4, rtol=1e-4)


def test_statistics_are_those_of_the_inputs(tmp_path: Path) -> None:
    stream = stream_of(write_llama(tmp_path), windows_of(131))
    states = stream.hidden.clone()
    list(stream.run(0))
    stats = stream.recorder.stats
    assert set(stats) == {f"self_attn.{n}_proj" for n in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    norm = torch.empty(64)
    open_source(tmp_path).take("model.layers.0.input_layernorm.weight", norm)
    x = states / (states.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm
    seen = stats["self_attn.q_proj"]
    assert seen is stats["self_attn.v_proj"]
    assert seen.count == 5 * 70
    torch.testing.assert_close(seen.absmax, x.abs().amax((0, 1)))
    torch.testing.assert_close(seen.absmean, x.abs().mean((0, 1)))
    rows = (x / x.square().mean(-1, keepdim=True).sqrt()).view(350, 64)
    assert seen.gram is not None
    torch.testing.assert_close(seen.gram, (rows.t() @ rows).unsqueeze(0), atol=1e-2, rtol=1e-4)
    grouped = InputStats.empty(64, 4, torch.device("cpu"), with_gram=True)
    grouped.add(x.view(350, 64), 8)
    assert grouped.gram is not None
    for i in range(16):
        torch.testing.assert_close(grouped.gram[i], seen.gram[0, 4 * i : 4 * i + 4, 4 * i : 4 * i + 4], atol=1e-2, rtol=1e-4)


def test_a_nan_among_the_inputs_is_not_lost() -> None:
    for bad in (float("nan"), float("inf")):
        stats = InputStats.empty(4, 2, torch.device("cpu"), with_gram=True)
        stats.add(torch.ones(3, 4), 2)
        assert stats.finite
        stats.add(torch.tensor([[1.0, bad, 1.0, 1.0]]), 2)
        stats.add(torch.ones(3, 4), 2)
        assert not stats.finite


#: those with one KV head of 20 have no AWQ layout: 20 outputs do not fill words of eight
FITTING = [name for name, family in FAMILIES.items() if family.changes.get("num_key_value_heads") != 1 or family.changes.get("head_dim") == 32]


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("family", FITTING)
def test_smoothing_changes_no_result_of_any_family(family: str, search: bool, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_reference(FAMILIES[family], folder)
    windows = windows_of(load_spec(folder).vocab_size, 2, 12)
    stream, source = stream_of(folder, windows), open_source(folder)
    tensors = {name: torch.empty(source.shape(name)) for name in source.names()}
    for name, out in tensors.items():
        source.take(name, out)
    moved = 0
    for plan in plans_of(folder):
        list(stream.run(plan.index))
        biases = {name: tensors.get(f"{plan.prefix}{name}.bias") for name in plan.linears}
        linears = {n: LinearWeight(tensors[f"{plan.prefix}{n}.weight"], torch.float32, biases[n], n not in plan.kept) for n in plan.linears}
        layer = LayerWeights(linears, {name: tensors[plan.prefix + name] for name in plan.others})
        assert smooth_layer(layer, stream.recorder.stats, stream.model.smoothing_groups(), Rounding(4, search)) == []
        for name, linear in linears.items():
            moved += linear.columns is not None
            tensors[f"{plan.prefix}{name}.weight"] = linear.weight
            if linear.bias is not None:
                tensors[f"{plan.prefix}{name}.bias"] = linear.bias
        tensors.update({plan.prefix + name: tensor for name, tensor in layer.others.items()})
    assert moved
    smoothed = write_folder(tmp_path / "smooth", json.loads((folder / "config.json").read_text()), tensors)
    prompt = windows[0].tolist()
    before, after = (Harness(load_model(f)).step([(0, prompt)])[0] for f in (folder, smoothed))
    torch.testing.assert_close(after, before, atol=2e-3, rtol=1e-3)
    assert any(not torch.equal(a, b) for a, b in zip(load_model(folder).tensors(), load_model(smoothed).tensors(), strict=True))
