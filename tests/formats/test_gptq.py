"""GPTQ files: zero points with their offset, groups in any order, ranks and fused layers; and a model computes what its numbers mean."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmdeploy.checkpoint.source import WeightSource, open_source
from lmdeploy.errors import CheckpointError
from lmdeploy.formats import packed4
from lmdeploy.formats.gptq import GptqFormat
from lmdeploy.formats.packed4 import Packed4
from lmdeploy.formats.weight_format import Part
from lmdeploy.kernels.reference import REFERENCE
from tests.formats.packing import Module, quantised_folder
from tests.helpers import Harness, load_model, write_folder, write_internlm2, write_llama

CPU = torch.device("cpu")
PROMPT = [1, 5, 77, 20, 9, 130, 3]


def source_of(folder: Path, **modules: dict[str, torch.Tensor]) -> WeightSource:
    return open_source(write_folder(folder, {}, {f"{name}.{suffix}": t for name, tensors in modules.items() for suffix, t in tensors.items()}))


def load(source: WeightSource, *parts: Part, group_size: int = 16, offset: int = 1) -> Packed4:
    return GptqFormat(group_size, offset).load(source, parts, False, torch.float32, CPU)


@pytest.mark.parametrize("offset", [1, 0])
def test_numbers_scales_and_zeros_arrive_bit_for_bit(tmp_path: Path, offset: int) -> None:
    module = Module.random(24, 64, 16, seed=1)
    assert {0, 15} <= set(module.zero.flatten().tolist()), "0 is stored as 15, which must not reach its neighbours"
    source = source_of(tmp_path, a=module.gptq(offset))
    weight = load(source, Part("a", 24, 64), offset=offset)
    source.finish()
    assert torch.equal(torch.stack((weight.qweight % 16, weight.qweight // 16), dim=-1).flatten(1).long(), module.q)
    assert torch.equal(weight.scales, module.scale.half()) and torch.equal(weight.zeros.float(), module.zero.float())
    assert weight.order is None


def test_the_layout_is_the_published_one_nibble_by_nibble(tmp_path: Path) -> None:
    tensors = Module.random(8, 16, 16, seed=2).gptq()
    weight = load(source_of(tmp_path, a=tensors), Part("a", 8, 16))
    for k in range(16):
        for n in range(8):
            byte = int(weight.qweight[n, k // 2])
            assert (byte >> 4 if k % 2 else byte & 15) == int(tensors["qweight"][k // 8, n]) >> (4 * (k % 8)) & 15
    for n in range(8):
        assert int(weight.zeros[n, 0]) == ((int(tensors["qzeros"][0, 0]) >> (4 * n) & 15) + 1) % 16


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_rows_and_columns_of_any_size_are_found(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    group = data.draw(st.sampled_from([2, 4, 12, 16]), "group")
    outputs, inputs = 8 * data.draw(st.integers(1, 7), "outputs / 8"), group * 8 * data.draw(st.integers(1, 4), "inputs / group / 8")
    module = Module.random(outputs, inputs, group, seed=data.draw(st.integers(0, 99), "seed"))
    low = data.draw(st.integers(0, outputs - 2), "first row")
    middle, high = data.draw(st.integers(low, outputs - 1), "second row"), outputs
    rows = [slice(middle, high), slice(low, middle)]
    first = data.draw(st.integers(0, inputs // group - 1), "first group")
    cols = slice(first * group, group * data.draw(st.integers(first + 1, inputs // group), "last group"))
    source = source_of(tmp_path_factory.mktemp("gptq"), a=module.gptq())
    weight = load(source, Part("a", outputs, inputs, rows, cols), group_size=group)
    assert torch.equal(weight.dequantised(torch.float32), torch.cat([module.weight[r] for r in rows])[:, cols])


@pytest.mark.parametrize("act_order", [False, True])
def test_files_are_read_in_blocks_that_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act_order: bool) -> None:
    monkeypatch.setattr(packed4, "BLOCK_BYTES", 100)
    module = Module.random(24, 160, 16, seed=3, act_order=act_order)
    weight = load(source_of(tmp_path, a=module.gptq()), Part("a", 24, 160))
    assert torch.equal(weight.dequantised(torch.float32), module.weight)


def test_act_order_multiplies_each_input_by_its_own_column(tmp_path: Path) -> None:
    module = Module.random(24, 64, 16, seed=4, act_order=True)
    weight = load(source_of(tmp_path, a=module.gptq()), Part("a", 24, 64))
    assert weight.order is not None and weight.order.nbytes <= weight.nbytes
    x, out = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), torch.empty(5, 24)
    weight.matmul(x, out, REFERENCE)
    torch.testing.assert_close(out, x @ module.weight.t())


def test_modules_of_one_layer_need_one_act_order(tmp_path: Path) -> None:
    first, other = (Module.random(8, 64, 16, seed=seed, act_order=True) for seed in (5, 6))
    same = Module(other.q, other.scale, other.zero, first.group)
    source = source_of(tmp_path, a=first.gptq(), b=other.gptq(), c=same.gptq())
    both = load(source, Part("a", 8, 64), Part("c", 8, 64))
    assert torch.equal(both.dequantised(torch.float32), torch.cat((first.weight, same.weight)))
    with pytest.raises(CheckpointError, match=r"'a\.g_idx' and 'b\.g_idx' differ"):
        load(source, Part("a", 8, 64), Part("b", 8, 64))


def test_act_order_is_not_split_along_the_inputs(tmp_path: Path) -> None:
    source = source_of(tmp_path, a=Module.random(8, 64, 16, seed=7, act_order=True).gptq())
    with pytest.raises(CheckpointError, match=r"a: act-order .* use tp=1"):
        load(source, Part("a", 8, 64, cols=slice(0, 32)))


def test_a_group_index_that_is_broken_is_named(tmp_path: Path) -> None:
    tensors = Module.random(8, 64, 16, seed=8).gptq()
    tensors["g_idx"][5] = 3
    with pytest.raises(CheckpointError, match=r"'a\.g_idx' does not hold each of the groups 0\.\.3 16 times"):
        load(source_of(tmp_path, a=tensors), Part("a", 8, 64))


def test_files_without_a_group_index_have_neighbours_in_groups(tmp_path: Path) -> None:
    module = Module.random(8, 64, 16, seed=9)
    tensors = module.gptq()
    del tensors["g_idx"]
    assert torch.equal(load(source_of(tmp_path, a=tensors), Part("a", 8, 64)).dequantised(torch.float32), module.weight)


@pytest.mark.parametrize(
    ("part", "group_size", "words"),
    [
        (Part("a", 24, 64), 48, ["a: 64 inputs", "group_size=48"]),
        (Part("a", 24, 64), 32, ["'a.qzeros'", "[4, 3]", "[2, 3]"]),
        (Part("a", 32, 64), 16, ["'a.qweight'", "[8, 24]", "[8, 32]"]),
        (Part("a", 24, 60), 4, ["60 inputs", "multiples of 8"]),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, part: Part, group_size: int, words: list[str]) -> None:
    with pytest.raises(CheckpointError) as error:
        load(source_of(tmp_path, a=Module.random(24, 64, 16, seed=8).gptq()), part, group_size=group_size)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("write", [write_llama, write_internlm2], ids=["llama", "internlm2"])
def test_a_model_computes_what_its_numbers_mean(tmp_path: Path, write: type[write_llama], act_order: bool) -> None:
    packed, plain = quantised_folder(write(tmp_path / "dense", intermediate_size=96), tmp_path, "gptq", 32, act_order=act_order)
    found, wanted = (Harness(load_model(folder)).step([(0, PROMPT)])[0] for folder in (packed, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_land_on_the_gpu_and_multiply_there(tmp_path: Path, dtype: torch.dtype, act_order: bool) -> None:
    module = Module.random(24, 64, 16, seed=4, act_order=act_order)
    weight = GptqFormat(16).load(source_of(tmp_path, a=module.gptq()), [Part("a", 24, 64)], False, dtype, torch.device("cuda"))
    assert all(t.is_cuda for t in weight.memory())
    assert torch.equal(weight.dequantised(torch.float32).cpu(), module.weight)
    x, out = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(dtype), torch.empty(5, 24, dtype=dtype, device="cuda")
    weight.matmul(x.cuda(), out, REFERENCE)
    torch.testing.assert_close(out.cpu().float(), x.float() @ module.weight.to(dtype).float().t(), rtol=2e-2, atol=2e-2)
