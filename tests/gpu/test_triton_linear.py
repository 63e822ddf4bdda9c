"""Triton's products with quantised weights on the GPU, in the shapes of real models, against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kernels.select import select
from tests.formats.packing import quantised_folder
from tests.helpers import Harness, load_model, write_llama

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
linear = pytest.importorskip("lmdeploy.kernels.triton_kernels.linear")
linear_w4 = pytest.importorskip("lmdeploy.kernels.triton_kernels.linear_w4")
linear_w8 = pytest.importorskip("lmdeploy.kernels.triton_kernels.linear_w8")

Tensor = torch.Tensor
DEVICE = torch.device("cuda")
#: inputs, outputs, group: layers of a 1.8B and a 7B model, a head, ragged edges, odd groups
SHAPES = [(2048, 4096, 128), (8192, 2048, 128), (4096, 28672, 128), (2048, 92544, 128), (384, 1000, 64), (172, 72, 86), (512, 136, 512)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEP = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def numbers(outer: int, inner: int, kind: torch.dtype) -> Tensor:
    if kind is torch.float8_e4m3fn:
        return (torch.randn(outer, inner, device=DEVICE) * 30).to(kind)
    return torch.randint(-127, 128, (outer, inner), device=DEVICE, dtype=torch.int8)


def close(found: Tensor, wanted: Tensor) -> None:
    assert (found.float() - wanted.float()).abs().max() <= STEP[wanted.dtype] * wanted.float().abs().max()


def packed(inner: int, outer: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    scales = (torch.rand(outer, inner // group, device=DEVICE) * 0.1 + 0.01).half()
    return (
        torch.randint(0, 256, (outer, inner // 2), dtype=torch.uint8, device=DEVICE),
        scales,
        torch.randint(0, 16, scales.shape, dtype=torch.uint8, device=DEVICE),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 8, 9, 17, 33, 65, 129, 192, 300])
@pytest.mark.parametrize(
    ("inner", "outer", "group"), SHAPES + [(14336, 4096, 128), (2048, 2048, 128), (4096, 4096, 128), (768, 1000, 32), (1152, 96, 96), (512, 64, 256)]
)
def test_w4_agrees_with_float32(rows: int, inner: int, outer: int, group: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, inner + 8, device=DEVICE).to(dtype)[:, :inner]
    bias, weight = torch.randn(outer, device=DEVICE).to(dtype), packed(inner, outer, group)
    for extra in (bias, None):
        found, wanted = torch.full((rows, outer), float("nan"), dtype=dtype, device=DEVICE), torch.empty(rows, outer, device=DEVICE)
        linear_w4.linear_w4(x, *weight, extra, found)
        REFERENCE.linear_w4(x.float(), weight[0], weight[1].float(), weight[2].float(), None if extra is None else extra.float(), wanted)
        assert (found.float() - wanted).abs().max() <= STEP[dtype] * wanted.abs().max()
        assert (found.float() - wanted).norm() <= STEP[dtype] / (1 if dtype is torch.float32 else 4) * wanted.norm()


@pytest.mark.parametrize("rows", [17, 64, 65, 129, 192])
@pytest.mark.parametrize(("inner", "outer"), [(2048, 4096), (8192, 2048), (4096, 28672)])
def test_w4_without_gluon_agrees_too(rows: int, inner: int, outer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_w4, "linear_w4_async", None)
    test_w4_agrees_with_float32(rows, inner, outer, 128, torch.bfloat16)


@pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="its instructions are Hopper's")
def test_gluon_serves_on_hopper_and_a_row_has_the_same_bits_whatever_the_others() -> None:
    asynchronous = linear_w4.linear_w4_async
    assert asynchronous is not None
    for inner, outer in ((2048, 2048), (14336, 4096), (2048, 16384)):
        weight = packed(inner, outer, 128)
        weight[1][::3] = 0  # groups of zeros
        for few, many in ((17, 32), (33, 64), (65, 128), (129, 192), (193, 384)):
            x = torch.randn(many, inner, device=DEVICE).bfloat16()
            assert asynchronous.serves(x, weight, 128)
            all_of_them, some = torch.empty(many, outer, device=DEVICE, dtype=x.dtype), torch.empty(few, outer, device=DEVICE, dtype=x.dtype)
            linear_w4.linear_w4(x, *weight, None, all_of_them)
            linear_w4.linear_w4(x[many - few :], *weight, None, some)
            assert torch.equal(all_of_them[many - few :], some) and all_of_them.isfinite().all()
    assert not linear_w4.arrivals(DEVICE).any()


@pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="its instructions are Hopper's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [17, 31, 64, 129, 384])
@pytest.mark.parametrize(("hidden", "width"), [(2048, 8192), (4096, 14336), (640, 1152)])
def test_a_layer_in_quarters_has_the_bits_of_one_in_plain_order(hidden: int, width: int, rows: int, dtype: torch.dtype) -> None:
    plain = select("turbomind", "cuda", dtype, head_dim=128)
    assert plain.quarters is not None
    gate_up, down, gain = packed(hidden, 2 * width, 128), packed(width, hidden, 128), torch.rand(hidden, device=DEVICE).to(dtype) + 0.5
    assert rows in plain.quarters.rows_served(gate_up, dtype) and 16 not in plain.quarters.rows_served(down, dtype)
    x, residual = (torch.randn(rows, hidden, device=DEVICE).to(dtype) for _ in range(2))
    results = []
    for kernels in (plain, plain.quarters.kernels):
        left, out = residual.clone(), torch.full((rows, hidden), float("nan"), dtype=dtype, device=DEVICE)
        normed, both, act = (torch.full((rows, size), float("nan"), dtype=dtype, device=DEVICE) for size in (hidden, 2 * width, width))
        kernels.rms_norm(x, gain, 1e-5, normed)
        for _ in range(2):
            kernels.linear_w4(normed, *gate_up, None, both)
            kernels.silu_mul(both.mul_(0.01), act)
            kernels.linear_w4(act, *down, None, out)
            kernels.add_rms_norm(out, left, gain, 1e-5, normed)
        results.append((left, out, both))
    assert results[0][0].isfinite().all()
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.skipif(torch.cuda.get_device_capability()[0] != 9, reason="its instructions are Hopper's")
def test_a_model_in_quarters_gives_the_same_logits(tmp_path: Path) -> None:
    dense = write_llama(tmp_path / "dense", hidden_size=512, intermediate_size=1152, head_dim=64, num_attention_heads=8)
    folder, _ = quantised_folder(dense, tmp_path, "awq", 128)
    kernels = select("turbomind", "cuda", torch.bfloat16, head_dim=64)
    models = [load_model(folder, dtype=torch.bfloat16, device="cuda", kernels=replace(kernels, quarters=quarters)) for quarters in (None, kernels.quarters)]
    assert models[0].quartered_rows == range(0) and models[1].quartered_rows == range(17, 385)
    for rows in (16, 17, 40, 130):
        found, wanted = (Harness(model).step([(0, [5 + 7 * i % 99 for i in range(rows)])])[0] for model in models)
        assert torch.equal(found, wanted) and found.isfinite().all()


def test_split_sums_of_w4_are_the_same_again_and_leave_counters_at_zero() -> None:
    x, weight = torch.randn(3, 8192, device=DEVICE).bfloat16(), packed(8192, 2048, 128)
    first, again = torch.empty(3, 2048, dtype=x.dtype, device=DEVICE), torch.empty(3, 2048, dtype=x.dtype, device=DEVICE)
    linear_w4.linear_w4(x, *weight, None, first)
    for _ in range(50):
        linear_w4.linear_w4(x, *weight, None, again)
        assert torch.equal(first, again)
    alone = torch.empty(1, 2048, dtype=x.dtype, device=DEVICE)
    linear_w4.linear_w4(x[2:], *weight, None, alone)
    linear_w4.linear_w4(torch.cat([x] * 2), *weight, None, again := torch.empty(6, 2048, dtype=x.dtype, device=DEVICE))
    assert torch.equal(again[:3], again[3:]) and torch.equal(again[2], first[2])
    assert not linear_w4.arrivals(x.device).any()


@pytest.mark.parametrize("kind", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 9, 17, 33, 300])
@pytest.mark.parametrize(("inner", "outer", "group"), SHAPES)
def test_8_bits_agree_with_the_reference(rows: int, inner: int, outer: int, group: int, dtype: torch.dtype, kind: torch.dtype) -> None:
    x, weight = torch.randn(rows, inner + 8, device=DEVICE).to(dtype)[:, :inner], numbers(outer, inner, kind)
    found, wanted = (torch.full((rows, outer), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2))
    for groups in (inner // group, 1):
        scales = torch.rand(outer, groups, device=DEVICE) * 0.01
        linear_w8.linear_w8(x, weight, scales, None, found)
        REFERENCE.linear_w8(x, weight, scales, None, wanted)
        close(found, wanted)
    linear.linear_w8a8(x, weight, scales, None, found)
    REFERENCE.linear_w8a8(x, weight, scales, None, wanted)
    close(found, wanted)


def test_quantised_products_beside_dense_ones(capsys: pytest.CaptureFixture[str]) -> None:
    """No bar here, tuning is another matter: a line each for the reader."""
    inner, outer = 4096, 28672
    dense = torch.randn(outer, inner, device=DEVICE).bfloat16()
    four, row = packed(inner, outer, 128), torch.rand(outer, 1, device=DEVICE)
    eight = numbers(outer, inner, torch.int8)
    for rows in (1, 16, 1024):
        x, out = torch.randn(rows, inner, device=DEVICE).bfloat16(), torch.empty(rows, outer, device=DEVICE, dtype=torch.bfloat16)
        times = {
            "dense": milliseconds(lambda x=x, out=out: REFERENCE.linear(x, dense, None, out)),
            "w4": milliseconds(lambda x=x, out=out: linear_w4.linear_w4(x, *four, None, out)),
            "w8": milliseconds(lambda x=x, out=out: linear_w8.linear_w8(x, eight, row, None, out)),
            "w8a8": milliseconds(lambda x=x, out=out: linear.linear_w8a8(x, eight, row, None, out)),
        }
        with capsys.disabled():
            print(f"\n{rows} rows, {outer}x{inner}, ms: " + "  ".join(f"{name} {time:.3f}" for name, time in times.items()))
        assert all(time > 0 for time in times.values())


def milliseconds(call) -> float:  # type: ignore[no-untyped-def]
    """Median of 20, after 3."""
    times = []
    for i in range(23):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]
