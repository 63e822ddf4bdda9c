"""AWQ files: every number ends where the published layout says, for fused layers and ranks too, and a model of them computes what its numbers mean."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.checkpoint.random_source import RandomSource
from lmdeploy.checkpoint.source import WeightSource, open_source
from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.formats import awq, packed4
from lmdeploy.formats.awq import AwqFormat
from lmdeploy.formats.packed4 import Packed4
from lmdeploy.formats.weight_format import Part
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.models.registry import build_model
from lmdeploy.parallel import Parallel
from lmdeploy.spec import load_spec
from tests.formats.packing import AWQ_ORDER, Module, configuration, quantised_folder
from tests.helpers import Harness, load_model, write_folder, write_internlm2, write_llama

CPU = torch.device("cpu")
PROMPT = [1, 5, 77, 20, 9, 130, 3]


def source_of(folder: Path, **modules: dict[str, torch.Tensor]) -> WeightSource:
    return open_source(write_folder(folder, {}, {f"{name}.{suffix}": t for name, tensors in modules.items() for suffix, t in tensors.items()}))


def load(source: WeightSource, *parts: Part, group_size: int = 16, bias: bool = False) -> Packed4:
    return AwqFormat(group_size).load(source, parts, bias, torch.float32, CPU)


def numbers_of(weight: Packed4) -> torch.Tensor:
    """q of the in-memory layout, byte by byte."""
    return torch.stack((weight.qweight % 16, weight.qweight // 16), dim=-1).flatten(1).long()


def test_numbers_scales_and_zeros_arrive_bit_for_bit(tmp_path: Path) -> None:
    module = Module.random(24, 64, 16, seed=1)
    weight = load(source_of(tmp_path, a=module.awq()), Part("a", 24, 64))
    assert torch.equal(numbers_of(weight), module.q)
    assert torch.equal(weight.scales, module.scale.half()) and torch.equal(weight.zeros.float(), module.zero.float())
    assert torch.equal(weight.dequantised(torch.float32), module.weight)
    assert weight.nbytes == 24 * 32 + 4 * 24 * 3


def test_the_layout_is_the_published_one_nibble_by_nibble(tmp_path: Path) -> None:
    """Read with shifts from the file, not with the helper that packed it."""
    module = Module.random(16, 8, 8, seed=2)
    tensors = module.awq()
    weight = load(source_of(tmp_path, a=tensors), Part("a", 16, 8), group_size=8)
    for k, c, i in itertools.product(range(8), range(2), range(8)):
        in_file = int(tensors["qweight"][k, c]) >> (4 * i) & 15
        byte = int(weight.qweight[8 * c + AWQ_ORDER[i], k // 2])
        assert (byte >> 4 if k % 2 else byte & 15) == in_file


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_rows_and_columns_of_any_size_are_found(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    group = data.draw(st.sampled_from([2, 8, 16, 24]), "group")
    outputs, inputs = 8 * data.draw(st.integers(1, 7), "outputs / 8"), group * 8 * data.draw(st.integers(1, 4), "inputs / group / 8")
    module = Module.random(outputs, inputs, group, seed=data.draw(st.integers(0, 99), "seed"))
    cuts = sorted(data.draw(st.sets(st.integers(0, outputs), min_size=2, max_size=6), "cuts"))
    rows = data.draw(st.permutations([slice(a, b) for a, b in itertools.pairwise(cuts)][::2] or [slice(0, outputs)]), "rows")
    count = inputs // group
    first = data.draw(st.integers(0, count - 1), "first group")
    cols = slice(first * group, group * data.draw(st.integers(first + 1, count), "last group"))
    source = source_of(tmp_path_factory.mktemp("awq"), a=module.awq())
    weight = load(source, Part("a", outputs, inputs, rows, cols), group_size=group)
    wanted = torch.cat([module.weight[r] for r in rows])[:, cols]
    assert torch.equal(weight.dequantised(torch.float32), wanted)


def test_files_are_read_in_blocks_that_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed4, "BLOCK_BYTES", 100)
    module = Module.random(24, 160, 16, seed=3)
    weight = load(source_of(tmp_path, a=module.awq()), Part("a", 24, 160, cols=slice(32, 128)))
    assert torch.equal(weight.dequantised(torch.float32), module.weight[:, 32:128])


def test_parts_stand_one_below_the_other_with_their_biases(tmp_path: Path) -> None:
    first, second = Module.random(16, 32, 16, seed=4), Module.random(8, 32, 16, seed=5)
    biases = torch.randn(24, generator=torch.Generator().manual_seed(0)).half()
    source = source_of(tmp_path, a={**first.awq(), "bias": biases[:16]}, b={**second.awq(), "bias": biases[16:]})
    weight = load(source, Part("a", 16, 32), Part("b", 8, 32), bias=True)
    source.finish()
    whole = torch.cat((first.weight, second.weight))
    assert torch.equal(weight.dequantised(torch.float32), whole)
    x, out = torch.randn(3, 32), torch.empty(3, 24)
    weight.matmul(x, out, REFERENCE)
    torch.testing.assert_close(out, x @ whole.t() + biases.float())


def test_one_group_over_all_inputs_is_minus_one(tmp_path: Path) -> None:
    module = Module.random(8, 48, 48, seed=6)
    source = source_of(tmp_path, a=module.awq())
    assert torch.equal(load(source, Part("a", 8, 48), group_size=-1).dequantised(torch.float32), module.weight)
    half = load(source, Part("a", 8, 48, cols=slice(24, 48)), group_size=-1)
    assert torch.equal(half.dequantised(torch.float32), module.weight[:, 24:])


def test_a_rank_that_cuts_a_group_repeats_its_scale(tmp_path: Path) -> None:
    module = Module.random(8, 96, 32, seed=7)
    weight = load(source_of(tmp_path, a=module.awq()), Part("a", 8, 96, cols=slice(48, 96)), group_size=32)
    assert weight.scales.shape == (8, 3)
    assert torch.equal(weight.dequantised(torch.float32), module.weight[:, 48:])


@pytest.mark.parametrize(
    ("part", "group_size", "words"),
    [
        (Part("a", 24, 64), 48, ["a: 64 inputs", "group_size=48", "[32, 64]"]),
        (Part("a", 24, 64), 0, ["group_size=0"]),
        (Part("a", 24, 64), 32, ["'a.qzeros'", "[4, 3]", "[2, 3]"]),
        (Part("a", 32, 64), 16, ["'a.qweight'", "[64, 3]", "[64, 4]"]),
        (Part("a", 20, 64), 16, ["a: ", "20 outputs", "multiples of 8"]),
        (Part("c", 24, 64), 16, ["'c.qweight' is missing"]),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, part: Part, group_size: int, words: list[str]) -> None:
    source = source_of(tmp_path, a=Module.random(24, 64, 16, seed=8).awq())
    with pytest.raises(CheckpointError) as error:
        load(source, part, group_size=group_size)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    packed, _ = quantised_folder(write_llama(tmp_path / "dense", intermediate_size=96), tmp_path, "awq", 32)
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_model(packed)


def test_scales_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    tensors = Module.random(8, 16, 16, seed=9).awq()
    tensors["scales"][0, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"'a\.scales' holds"):
        load(source_of(tmp_path, a=tensors), Part("a", 8, 16))


@pytest.mark.parametrize("write", [write_llama, write_internlm2], ids=["llama", "internlm2"])
def test_a_model_computes_what_its_numbers_mean(tmp_path: Path, write: type[write_llama]) -> None:
    packed, plain = quantised_folder(write(tmp_path / "dense", intermediate_size=96), tmp_path, "awq", 32)
    quantised, dense = load_model(packed), load_model(plain)
    found, wanted = (Harness(model).step([(0, PROMPT)])[0] for model in (quantised, dense))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert quantised.weight_bytes < 0.6 * dense.weight_bytes, "the head and the table stay as they are"
    linears = sum(layer.attention.qkv.weight.nbytes for layer in quantised.layers)
    assert linears == 2 * 192 * (32 + 2 * 3)


def test_modules_that_stay_dense_are_read_so(tmp_path: Path) -> None:
    packed, plain = quantised_folder(write_llama(tmp_path / "dense", intermediate_size=96), tmp_path, "awq", 32, skip=("down_proj", "layers.1.self_attn"))
    found, wanted = (Harness(load_model(folder)).step([(0, PROMPT)])[0] for folder in (packed, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_quantised_head_is_read_too(tmp_path: Path) -> None:
    dense = write_llama(tmp_path / "dense", intermediate_size=96, vocab_size=136)
    packed, plain = quantised_folder(dense, tmp_path, "awq", 32, also=("lm_head",))
    models = [load_model(folder) for folder in (packed, plain)]
    assert isinstance(models[0].head.weight, Packed4)
    found, wanted = (Harness(model).step([(0, PROMPT)])[0] for model in models)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_random_weights_have_the_format_that_config_json_asks_for(tmp_path: Path, method: str) -> None:
    """For benchmarks: every linear in the layers is packed, the head is not."""
    overrides = {"quantization_config": configuration(method, 32), "intermediate_size": 96}
    spec = load_spec(write_llama(tmp_path), overrides)
    model = build_model(spec, torch.float32, CPU, REFERENCE, Parallel())
    model.load(RandomSource())
    layer = model.layers[1]
    assert all(isinstance(part.weight, Packed4) for part in (layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down))
    assert not isinstance(model.head.weight, Packed4)
    logits = Harness(model).step([(0, PROMPT)])[0]
    assert bool(logits.isfinite().all()) and float(logits.std()) > 0


def test_a_layer_of_both_kinds_is_refused(tmp_path: Path) -> None:
    packed, _ = quantised_folder(write_llama(tmp_path / "dense", intermediate_size=96), tmp_path, "awq", 32, skip=("k_proj",))
    with pytest.raises(CheckpointError, match="q_proj.* is quantised, but .*k_proj is not"):
        load_model(packed)


def test_quantise_follows_the_formula_and_pack_loses_nothing(tmp_path: Path) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(10))
    q, scales, zeros = awq.quantise(weight, 16)
    wanted = Module.of(weight, 16)
    assert q.dtype == torch.uint8 and torch.equal(q.long(), wanted.q)
    assert torch.equal(scales, wanted.scale) and torch.equal(zeros, wanted.zero.float())
    packed = awq.pack(q, scales, zeros)
    assert {name: t.dtype for name, t in packed.items()} == {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}
    assert all(torch.equal(packed[name], t) for name, t in wanted.awq().items())
    loaded = load(source_of(tmp_path, a=packed), Part("a", 32, 64))
    assert torch.equal(loaded.dequantised(torch.float32), wanted.weight)


@pytest.mark.parametrize("value", [0.5, -0.5, 0.0])
def test_a_group_of_equal_numbers_keeps_its_value(value: float) -> None:
    q, scales, zeros = awq.quantise(torch.full((8, 16), value), 16)
    torch.testing.assert_close((q - zeros) * scales, torch.full((8, 16), value), rtol=1e-3, atol=1e-5)


def test_the_rounding_error_is_half_a_step_at_most() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(11)) + 0.3
    q, scales, zeros = awq.quantise(weight, 32)
    error = ((q.view(64, 4, 32) - zeros.unsqueeze(-1)) * scales.unsqueeze(-1) - weight.view(64, 4, 32)).abs()
    assert bool((error <= scales.unsqueeze(-1) * 1.01).all()) and float(error.mean()) < float(scales.mean()) * 0.26


def test_sizes_that_cannot_be_packed_are_named() -> None:
    with pytest.raises(ConfigError, match="60 inputs .* group_size=16"):
        awq.quantise(torch.zeros(8, 60), 16)
    with pytest.raises(ConfigError, match="12 outputs"):
        awq.pack(*awq.quantise(torch.zeros(12, 16), 16))
