"""Experts: the router's choice, its weights, and each rank's slice of every expert."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lmdeploy.checkpoint.source import WeightSource, open_source
from lmdeploy.errors import CheckpointError
from lmdeploy.formats.choose import DENSE as DENSE_FILES
from lmdeploy.formats.choose import Formats, choose_formats
from lmdeploy.inputs import AttentionMeta, ForwardInputs, Scratch
from lmdeploy.kernels.api import Kernels
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.layers.build import BuildContext, StepBuffers, StepShape
from lmdeploy.layers.experts import ExpertNames, Experts
from lmdeploy.parallel import Parallel
from lmdeploy.spec import ModelSpec
from tests.formats.packing import Module, by_rows, configuration, fp8, meaning, smooth_quant
from tests.helpers import LLAMA_CONFIG, write_folder

CPU, COUNT, WIDTH, INNER = torch.device("cpu"), 5, 12, 8
DENSE = ModelSpec.from_config({**LLAMA_CONFIG, "hidden_size": WIDTH, "head_dim": 4})
SPEC = replace(DENSE, num_experts=COUNT, experts_per_token=2, moe_intermediate_size=INNER)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> WeightSource:
    generator = torch.Generator().manual_seed(0)
    tensors = {"m.gate.weight": torch.randn(COUNT, WIDTH, generator=generator)}
    for e in range(COUNT):
        for name, shape in (("gate", (INNER, WIDTH)), ("up", (INNER, WIDTH)), ("down", (WIDTH, INNER))):
            tensors[f"m.experts.{e}.{name}_proj.weight"] = torch.randn(shape, generator=generator)
    return open_source(write_folder(tmp_path_factory.mktemp("experts"), {}, tensors))


def run(
    source: WeightSource,
    spec: ModelSpec,
    x: torch.Tensor,
    rank: int = 0,
    size: int = 1,
    formats: Formats = DENSE_FILES,
    prefix: str = "m",
    kernels: Kernels = REFERENCE,
) -> torch.Tensor:
    """This rank's sum, without the sum over ranks."""
    ctx = BuildContext(spec, Parallel(rank, size), kernels, torch.float32, CPU, formats)
    layer = Experts(ctx, prefix, ExpertNames())
    layer.load(source)
    layer.parallel = Parallel()
    scratch = Scratch(len(x), torch.float32, CPU)
    step = StepBuffers.take(scratch, StepShape.of(ctx, dense_mlp=False), len(x))
    step.normed.copy_(x)
    none = torch.empty(0, dtype=torch.int32)
    meta = AttentionMeta(none, none, none, none, [], [], 0)
    layer.forward(ForwardInputs(none, none, None, meta, [], none, scratch), step)  # experts read the buffers only
    return step.proj


def naive(source: WeightSource, x: torch.Tensor, normalise: bool) -> torch.Tensor:
    def get(name: str, *shape: int) -> torch.Tensor:
        out = torch.empty(shape)
        source.take(name, out)
        return out

    shares = torch.softmax(x @ get("m.gate.weight", COUNT, WIDTH).t(), dim=-1)
    out = torch.zeros_like(x)
    for t, row in enumerate(shares):
        best = sorted(range(COUNT), key=lambda e: -float(row[e]))[:2]
        total = sum(float(row[e]) for e in best) if normalise else 1.0
        for e in best:
            gate, up = (get(f"m.experts.{e}.{name}_proj.weight", INNER, WIDTH) @ x[t] for name in ("gate", "up"))
            out[t] += float(row[e]) / total * (get(f"m.experts.{e}.down_proj.weight", WIDTH, INNER) @ (gate * torch.sigmoid(gate) * up))
    return out


@pytest.mark.parametrize("normalise", [True, False])
def test_the_two_likeliest_experts_are_summed_by_the_router(source: WeightSource, normalise: bool) -> None:
    x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))
    found = run(source, replace(SPEC, norm_topk_prob=normalise), x)
    torch.testing.assert_close(found, naive(source, x, normalise), rtol=1e-5, atol=1e-5)


def test_a_kernel_set_may_choose_the_experts_itself(source: WeightSource) -> None:
    def choose(scores: torch.Tensor, normalise: bool, chosen: torch.Tensor, weights: torch.Tensor) -> None:
        asked.append(normalise)
        torch.topk(-scores, chosen.shape[1], out=(weights, chosen))  # the least likely ones: nobody else would
        weights.fill_(0.5)

    asked: list[bool] = []
    x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))
    found = run(source, replace(SPEC, norm_topk_prob=True), x, kernels=replace(REFERENCE, choose_experts=choose))
    assert asked == [True] and found.isfinite().all()
    assert (found - naive(source, x, True)).abs().amax(1).min() > 1e-3


def test_ranks_hold_slices_of_every_expert_that_sum_to_the_whole(source: WeightSource) -> None:
    x = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))
    total = sum(run(source, SPEC, x, rank, 2) for rank in range(2))
    torch.testing.assert_close(total, run(source, SPEC, x), rtol=1e-5, atol=1e-5)


def write_quantised(folder: Path, method: str, dense_experts: int = 0) -> tuple[WeightSource, WeightSource]:
    """(4-bit source, dense source of the same numbers) of experts 16 wide, 32 inside; the router stays dense."""
    router = {"m.gate.weight": torch.randn(COUNT, 16, generator=torch.Generator().manual_seed(2))}
    packed, plain = dict(router), dict(router)
    for e in range(COUNT):
        for i, (name, shape) in enumerate((("gate", (32, 16)), ("up", (32, 16)), ("down", (16, 32)))):
            module, full = Module.random(*shape, 8, seed=3 * e + i), f"m.experts.{e}.{name}_proj"
            plain[f"{full}.weight"] = module.weight
            if e < dense_experts:
                packed[f"{full}.weight"] = module.weight
            else:
                packed |= {f"{full}.{suffix}": t for suffix, t in (module.awq() if method == "awq" else module.gptq()).items()}
    return open_source(write_folder(folder / "packed", {}, packed)), open_source(write_folder(folder / "plain", {}, plain))


WIDE = replace(SPEC, hidden_size=16, moe_intermediate_size=32)


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("size", [1, 2])
def test_quantised_experts_compute_what_their_numbers_mean(tmp_path: Path, method: str, size: int) -> None:
    packed, plain = write_quantised(tmp_path, method)
    x = torch.randn(7, 16, generator=torch.Generator().manual_seed(1))
    formats = choose_formats(configuration(method, 8))
    found = sum(run(packed, WIDE, x, rank, size, formats) for rank in range(size))
    torch.testing.assert_close(found, run(plain, WIDE, x), rtol=1e-4, atol=1e-4)


def test_experts_stay_packed_in_memory(tmp_path: Path) -> None:
    packed, _ = write_quantised(tmp_path, "awq")
    layer = Experts(BuildContext(WIDE, Parallel(), REFERENCE, torch.float32, CPU, choose_formats(configuration("awq", 8))), "m", ExpertNames())
    layer.load(packed)
    packed.finish()
    assert sum(t.nbytes for t in layer.tensors()) == 4 * COUNT * 16 + COUNT * 3 * (16 * 32 // 2 + 3 * 16 * 32 // 8)


def test_experts_of_both_kinds_are_refused(tmp_path: Path) -> None:
    packed, _ = write_quantised(tmp_path, "awq", dense_experts=1)
    with pytest.raises(CheckpointError, match=r"m\.experts: some experts are quantised and others are not"):
        run(packed, WIDE, torch.zeros(1, 16), formats=choose_formats(configuration("awq", 8)))


EIGHT: dict[str, tuple[Formats, Any]] = {
    "smooth_quant": (choose_formats({"quant_method": "smooth_quant"}, quantise_activations=False), lambda w: smooth_quant(w, torch.int8)),
    "fp8 blocks": (choose_formats({"quant_method": "fp8", "weight_block_size": [8, 16]}), lambda w: fp8(w, (8, 16))),
    "at load": (choose_formats(None, "fp8"), lambda w: ({"weight": w}, meaning(*by_rows(w, torch.float8_e4m3fn, (1, 16)), (1, 16)))),
}


@pytest.mark.parametrize("way", EIGHT)
@pytest.mark.parametrize("size", [1, 2])
def test_experts_in_8_bits_compute_what_their_numbers_mean(tmp_path: Path, way: str, size: int) -> None:
    formats, store = EIGHT[way]
    generator, prefix = torch.Generator().manual_seed(2), "model.layers.0.m"
    packed = {f"{prefix}.gate.weight": torch.randn(COUNT, 16, generator=generator)}
    plain = dict(packed)
    for e in range(COUNT):
        for name, shape in (("gate", (32, 16)), ("up", (32, 16)), ("down", (16, 32))):
            full = f"{prefix}.experts.{e}.{name}_proj"
            stored, plain[f"{full}.weight"] = store(torch.randn(shape, generator=generator))
            packed |= {f"{full}.{suffix}": t for suffix, t in stored.items()}
    # of inputs that are cut for two ranks "at load" rounds each half by itself
    if way == "at load":
        plain |= {name: meaning(*by_rows(packed[name], torch.float8_e4m3fn, (1, 32 // size)), (1, 32 // size)) for name in packed if "down_proj" in name}
    source, dense = (open_source(write_folder(tmp_path / name, {}, tensors)) for name, tensors in (("packed", packed), ("plain", plain)))
    x = torch.randn(7, 16, generator=generator)
    found = sum(run(source, WIDE, x, rank, size, formats, prefix) for rank in range(size))
    torch.testing.assert_close(found, run(dense, WIDE, x, prefix=prefix), rtol=1e-4, atol=1e-4)
