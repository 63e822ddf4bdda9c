"""Linear layers: what the ranks of a tensor-parallel group hold adds up to the whole, for every layout of the file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lmdeploy.checkpoint.source import WeightSource, open_source
from lmdeploy.formats import at_load
from lmdeploy.formats.at_load import AtLoadFormat, Rounding8
from lmdeploy.formats.choose import choose_formats
from lmdeploy.formats.packed4 import Packed4
from lmdeploy.formats.packed8 import Packed8
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.layers.build import BuildContext
from lmdeploy.layers.linear import GateUpLinear, Linear, QKVLinear, RowLinear
from lmdeploy.parallel import Parallel
from lmdeploy.spec import ModelSpec
from tests.formats.packing import Module, by_rows, compressed4, compressed_entry, configuration, fp8, meaning, smooth_quant
from tests.helpers import LLAMA_CONFIG, write_folder

SPEC = ModelSpec.from_config({**LLAMA_CONFIG, "hidden_size": 12, "head_dim": 4, "intermediate_size": 10})
DIM, HEADS, KV_HEADS, WIDTH = 4, 4, 2, 12


def context(rank: int = 0, size: int = 1) -> BuildContext:
    return BuildContext(SPEC, Parallel(rank, size), REFERENCE, torch.float32, torch.device("cpu"))


def numbered(rows: int, first: int) -> torch.Tensor:
    """Rows that can be told apart: row r is full of first + r."""
    return (torch.arange(rows, dtype=torch.float32) + first).unsqueeze(1).repeat(1, WIDTH)


def source_of(tmp_path: Path, **tensors: torch.Tensor) -> WeightSource:
    return open_source(write_folder(tmp_path, {}, tensors))


def loaded(layer: Linear, source: WeightSource) -> list[torch.Tensor]:
    layer.load(source)
    return list(layer.tensors())


Q, K, V = numbered(HEADS * DIM, 0), numbered(KV_HEADS * DIM, 100), numbered(KV_HEADS * DIM, 200)
FUSED = {
    "separate": (("q", "k", "v"), False, {"a.q.weight": Q, "a.k.weight": K, "a.v.weight": V}),
    "stacked": (("qkv",), False, {"a.qkv.weight": torch.cat((Q, K, V))}),
    "interleaved": (("qkv",), True, {"a.qkv.weight": torch.cat((Q[:8], K[:4], V[:4], Q[8:], K[4:], V[4:]))}),
}


@pytest.mark.parametrize("layout", FUSED)
@pytest.mark.parametrize("size", [1, 2])
def test_qkv_rows_of_a_rank_are_its_queries_keys_and_values(tmp_path: Path, layout: str, size: int) -> None:
    parts, interleaved, tensors = FUSED[layout]
    source = source_of(tmp_path, **tensors)
    for rank in range(size):
        (weight,) = loaded(QKVLinear(context(rank, size), "a", parts, interleaved=interleaved), source)
        wanted = torch.cat([t.chunk(size)[rank] for t in (Q, K, V)])
        assert torch.equal(weight, wanted)


@pytest.mark.parametrize("layout", ["separate", "interleaved"])
def test_biases_are_laid_out_like_their_rows(tmp_path: Path, layout: str) -> None:
    parts, interleaved, tensors = FUSED[layout]
    biases = {name.replace("weight", "bias"): t[:, 0].clone() for name, t in tensors.items()}
    weight, bias = loaded(QKVLinear(context(), "a", parts, interleaved=interleaved), source_of(tmp_path, **tensors, **biases))
    assert torch.equal(bias, weight[:, 0])


def test_a_head_count_that_cannot_be_split_is_refused() -> None:
    with pytest.raises(ValueError, match="tp=3"):
        QKVLinear(context(0, 3), "a", ("q", "k", "v"))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_gate_and_up_of_a_rank_are_the_same_columns_of_the_mlp(tmp_path: Path, stacked: bool, size: int) -> None:
    gate, up = numbered(10, 0), numbered(10, 50)
    tensors = {"m.gate_up.weight": torch.cat((gate, up))} if stacked else {"m.gate.weight": gate, "m.up.weight": up}
    source = source_of(tmp_path, **tensors)
    for rank in range(size):
        (weight,) = loaded(GateUpLinear(context(rank, size), "m", ("gate_up",) if stacked else ("gate", "up"), 10), source)
        assert torch.equal(weight, torch.cat((gate.chunk(size)[rank], up.chunk(size)[rank])))


def test_row_layers_of_the_ranks_sum_to_the_whole_with_one_bias(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(shape, generator=generator) for shape in ((7, WIDTH), (7,), (5, WIDTH)))
    source, total = source_of(tmp_path, **{"o.weight": weight, "o.bias": bias}), torch.zeros(5, 7)
    for rank in range(4):
        layer, out = RowLinear(context(rank, 4), "o", WIDTH, 7, expect_bias=True), torch.empty(5, 7)
        layer.load(source)
        Linear.forward(layer, x.chunk(4, dim=1)[rank], out)  # without the sum over ranks, which is this test's own
        total += out
    torch.testing.assert_close(total, x @ weight.t() + bias)


def test_weights_are_cast_to_the_type_of_the_model(tmp_path: Path) -> None:
    ctx = replace(context(), dtype=torch.bfloat16)
    (weight,) = loaded(QKVLinear(ctx, "a", ("q", "k", "v")), source_of(tmp_path, **FUSED["separate"][2]))
    assert weight.dtype == torch.bfloat16 and torch.equal(weight, torch.cat((Q, K, V)).bfloat16())


def quantised(tmp_path: Path, method: str, **modules: Module) -> WeightSource:
    return source_of(tmp_path, **{f"{name}.{suffix}": t for name, m in modules.items() for suffix, t in (m.awq() if method == "awq" else m.gptq()).items()})


def packed_context(method: str, rank: int, size: int) -> BuildContext:
    spec = replace(SPEC, hidden_size=32, intermediate_size=48)
    return BuildContext(spec, Parallel(rank, size), REFERENCE, torch.float32, torch.device("cpu"), choose_formats(configuration(method, 8)))


def dequantised(layer: Linear, source: WeightSource) -> torch.Tensor:
    layer.load(source)
    assert isinstance(layer.weight, Packed4)
    return layer.weight.dequantised(torch.float32)


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("size", [1, 2])
def test_ranks_of_quantised_layers_hold_the_same_slices_as_dense_ones(tmp_path: Path, method: str, size: int) -> None:
    qkv, gate, up, down = (Module.random(n, k, 8, seed=n + k) for n, k in ((32, 32), (48, 32), (48, 32), (32, 48)))
    source = quantised(tmp_path, method, **{"a.qkv": qkv, "m.gate": gate, "m.up": up, "down": down})
    groups = qkv.weight.view(KV_HEADS, 4, DIM, 32)  # two query heads, their key, their value
    q, k, v = groups[:, :2].flatten(0, 2), groups[:, 2].flatten(0, 1), groups[:, 3].flatten(0, 1)
    for rank in range(size):
        ctx = packed_context(method, rank, size)
        found = dequantised(QKVLinear(ctx, "a", ("qkv",), interleaved=True), source)
        assert torch.equal(found, torch.cat([t.chunk(size)[rank] for t in (q, k, v)]))
        found = dequantised(GateUpLinear(ctx, "m", ("gate", "up"), 48), source)
        assert torch.equal(found, torch.cat([t.weight.chunk(size)[rank] for t in (gate, up)]))
        found = dequantised(RowLinear(ctx, "down", 48, 32, expect_bias=False), source)
        assert torch.equal(found, down.weight.chunk(size, dim=1)[rank])


WIDE = {"hidden_size": 32, "intermediate_size": 64}
EIGHT: dict[str, tuple[dict[str, Any] | None, Any]] = {
    "smooth_quant": ({"quant_method": "smooth_quant", "quant_dtype": "int8"}, lambda w: smooth_quant(w, torch.int8)),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [16, 16]}, lambda w: fp8(w, (16, 16))),
    "compressed 4": (compressed_entry("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8}), lambda w: compressed4(w, 8)),
    "at load": (None, lambda w: ({"weight": w}, meaning(*by_rows(w, torch.float8_e4m3fn, (1, 32)), (1, 32)))),
}


@pytest.mark.parametrize("way", EIGHT)
@pytest.mark.parametrize("size", [1, 2])
def test_ranks_of_any_quantised_format_hold_the_same_slices_as_dense_ones(tmp_path: Path, way: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, store = EIGHT[way]
    monkeypatch.setattr(at_load, "FP8", AtLoadFormat(Rounding8(torch.float8_e4m3fn, 32)))
    generator = torch.Generator().manual_seed(0)
    made = {name: store(torch.randn(n, k, generator=generator)) for name, n, k in (("qkv", 32, 32), ("w1", 64, 32), ("w3", 64, 32), ("w2", 32, 64))}
    source = source_of(tmp_path, **{f"model.layers.0.{name}.{suffix}": t for name, (tensors, _) in made.items() for suffix, t in tensors.items()})
    wanted = {name: weight for name, (_, weight) in made.items()}
    groups = wanted["qkv"].view(KV_HEADS, 4, DIM, 32)
    q, k, v = groups[:, :2].flatten(0, 2), groups[:, 2].flatten(0, 1), groups[:, 3].flatten(0, 1)
    formats = choose_formats(entry, None if entry else "fp8")
    for rank in range(size):
        ctx = BuildContext(replace(SPEC, **WIDE), Parallel(rank, size), REFERENCE, torch.float32, torch.device("cpu"), formats)
        layers = {
            "qkv": (QKVLinear(ctx, "model.layers.0", ("qkv",), interleaved=True), torch.cat([t.chunk(size)[rank] for t in (q, k, v)])),
            "gate_up": (GateUpLinear(ctx, "model.layers.0", ("w1", "w3"), 64), torch.cat([wanted[name].chunk(size)[rank] for name in ("w1", "w3")])),
            "down": (RowLinear(ctx, "model.layers.0.w2", 64, 32, expect_bias=False), wanted["w2"].chunk(size, dim=1)[rank]),
        }
        for layer, part in layers.values():
            layer.load(source)
            assert isinstance(layer.weight, (Packed4, Packed8))
            assert torch.equal(layer.weight.dequantised(torch.float32), part)
