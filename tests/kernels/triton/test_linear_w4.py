"""Triton's 4-bit products in its interpreter, against the reference. (bfloat16, and the bits that are turned into floats, are met on the GPU.)"""

from __future__ import annotations

import pytest
import torch

from lmdeploy.kernels.reference import REFERENCE

row = pytest.importorskip("lmdeploy.kernels.triton_kernels.linear_w4_row", reason="triton is not installed")
w4 = pytest.importorskip("lmdeploy.kernels.triton_kernels.linear_w4", reason="triton is not installed")
mid = pytest.importorskip("lmdeploy.kernels.triton_kernels.linear_w4_mid", reason="triton is not installed")

Tensor = torch.Tensor
#: inputs, outputs, group: split sums of whole tiles, several warps and steps, split sums, groups below and above a tile, groups that are no power of two, one tile
SHAPES = [(4096, 40, 128), (1024, 40, 128), (512, 24, 64), (256, 72, 32), (768, 48, 256), (384, 33, 96), (128, 16, 128), (896, 136, 128), (172, 30, 86)]


def weight(inner: int, outer: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    scales = (torch.rand(outer, inner // group, generator=generator) * 0.1 + 0.01).half()
    return (
        torch.randint(0, 256, (outer, inner // 2), dtype=torch.uint8, generator=generator),
        scales,
        torch.randint(0, 16, scales.shape, dtype=torch.uint8, generator=generator),
    )


def activations(rows: int, inner: int, extra: int = 8) -> Tensor:
    """Rows that are parts of wider ones."""
    return torch.randn(rows, inner + extra, generator=torch.Generator().manual_seed(rows)).half()[:, :inner]


def close(found: Tensor, wanted: Tensor) -> None:
    assert (found.float() - wanted.float()).abs().max() <= 2e-3 * wanted.float().abs().max()


@pytest.mark.parametrize("rows", [1, 8, 9, 17, 70])
@pytest.mark.parametrize(("inner", "outer", "group"), SHAPES)
def test_it_agrees_with_the_reference(rows: int, inner: int, outer: int, group: int) -> None:
    x, parts, bias = activations(rows, inner), weight(inner, outer, group), activations(1, outer)[0].contiguous()
    for extra in (bias, None):
        found, wanted = (torch.full((rows, outer), float("nan"), dtype=x.dtype) for _ in range(2))
        w4.linear_w4(x, *parts, extra, found)
        REFERENCE.linear_w4(x, *parts, extra, wanted)
        close(found, wanted)


@pytest.mark.parametrize(("inner", "outer", "group"), SHAPES[:6])
def test_many_rows_are_multiplied_by_weights_that_are_written_out(inner: int, outer: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w4, "MANY_ROWS", 2)
    monkeypatch.setattr(mid, "TILE_ROWS", 2)
    monkeypatch.setattr(w4, "MOST_NUMBERS", 10 * inner)
    x, parts, bias = activations(3, inner), weight(inner, outer, group), activations(1, outer)[0].contiguous()
    for extra in (bias, None):
        found, wanted = (torch.full((3, outer), float("nan"), dtype=x.dtype) for _ in range(2))
        w4.linear_w4(x, *parts, extra, found)
        REFERENCE.linear_w4(x, *parts, extra, wanted)
        close(found, wanted)


def test_gluon_is_not_for_other_devices_nor_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    asynchronous = pytest.importorskip("lmdeploy.kernels.triton_kernels.linear_w4_async", reason="a Triton without Gluon")
    x, parts = activations(20, 256, 0), weight(256, 40, 128)
    assert not asynchronous.serves(x, parts, 128)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not asynchronous._usable(torch.device("cuda", 5), torch.bfloat16)  # nothing can be computed there


@pytest.mark.parametrize("extra", [8, 7])
def test_rows_may_lie_anywhere(extra: int) -> None:
    x, parts = activations(3, 256, extra)[1:], weight(256, 40, 128)
    found, wanted = torch.empty(2, 40, dtype=x.dtype), torch.empty(2, 40, dtype=x.dtype)
    w4.linear_w4(x, *parts, None, found)
    REFERENCE.linear_w4(x, *parts, None, wanted)
    close(found, wanted)


def test_weights_are_not_rounded() -> None:
    """One input at a time: (q - zero) * scale is rounded to the result's type, and never before."""
    parts = weight(128, 40, 128)
    x, found = torch.eye(128)[:16].half(), torch.empty(16, 40, dtype=torch.float16)
    w4.linear_w4(x, *parts, None, found)
    q = torch.stack((parts[0] & 15, parts[0] >> 4), dim=-1).flatten(1).float()
    assert torch.equal(found, ((q - parts[2].float()) * parts[1].float()).half().t()[:16])


@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize(("inner", "outer", "first"), [(1024, 40, 2), (256, 264, 1)])
def test_a_row_has_the_same_bits_among_few_and_among_many(inner: int, outer: int, first: int, rows: int) -> None:
    """One row of long weight rows apart, which has a kernel of its own."""
    x, parts = activations(rows, inner), weight(inner, outer, 128)
    together, few = torch.empty(rows, outer, dtype=x.dtype), torch.empty(first, outer, dtype=x.dtype)
    w4.linear_w4(x, *parts, None, together)
    w4.linear_w4(x[5 : 5 + first], *parts, None, few)
    assert torch.equal(few, together[5 : 5 + first])


@pytest.mark.parametrize(("least", "most"), [(17, 31), (33, 60), (65, 120), (129, 190)])
def test_a_row_has_the_same_bits_among_its_number_of_rows_and_among_more(least: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mid, "LARGE", 1)
    x, parts = activations(most, 2048), weight(2048, 40, 128)
    together, fewer = torch.empty(most, 40, dtype=x.dtype), torch.empty(least, 40, dtype=x.dtype)
    w4.linear_w4(x, *parts, None, together)
    w4.linear_w4(x[:least], *parts, None, fewer)
    assert torch.equal(fewer, together[:least])


def test_a_large_weight_and_more_rows_than_a_tile_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mid, "LARGE", 72 * 512)
    assert mid.serves(130, 72, 512, 128) and not mid.serves(130, 71, 512, 128) and not mid.serves(193, 72, 512, 128) and not mid.serves(70, 72, 512, 32)
    x, parts, bias = activations(130, 512), weight(512, 72, 128), activations(1, 72)[0].contiguous()
    found, wanted = (torch.full((130, 72), float("nan"), dtype=x.dtype) for _ in range(2))
    w4.linear_w4(x, *parts, bias, found)
    REFERENCE.linear_w4(x, *parts, bias, wanted)
    close(found, wanted)


def test_groups_without_a_scale_add_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are kept in units of the present group's scale, which may be zero: for the first group, for others, for all of a row."""
    monkeypatch.setattr(w4, "MANY_ROWS", 16)
    x, (qweight, scales, zeros) = activations(20, 1024), weight(1024, 40, 128)
    scales[0, 0] = scales[1, 3] = scales[2, -1] = 0
    scales[3] = 0
    scales[4] = -scales[4]
    found, wanted = torch.empty(20, 40, dtype=x.dtype), torch.empty(20, 40, dtype=x.dtype)
    w4.linear_w4(x, qweight, scales, zeros, None, found)
    REFERENCE.linear_w4(x, qweight, scales, zeros, None, wanted)
    close(found, wanted)
    assert not found[:, 3].abs().gt(1e-6).any()


@pytest.mark.parametrize(("rows", "splits"), [(20, 2), (70, 1)])
def test_tiles_of_the_result_that_are_smaller_than_it(rows: int, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of rows and of columns, in bands of columns, whole sums and split ones."""
    monkeypatch.setattr(w4, "MANY_ROWS", 16)
    monkeypatch.setattr(mid, "_launch", lambda *sizes: mid._Launch(16, 16, 3, splits))
    monkeypatch.setattr(mid, "BAND", 2)
    x, parts, bias = activations(rows, 512), weight(512, 72, 128), activations(1, 72)[0].contiguous()
    found, wanted = (torch.full((rows, 72), float("nan"), dtype=x.dtype) for _ in range(2))
    w4.linear_w4(x, *parts, bias, found)
    REFERENCE.linear_w4(x, *parts, bias, wanted)
    close(found, wanted)
    assert not w4.arrivals(torch.device("cpu")).any()


@pytest.mark.parametrize(("rows", "inner"), [(3, 8192), (12, 2048)])
def test_weights_that_are_streamed(rows: int, inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those are that `_once_kernel` leaves alone for their size; one of the two sums is split."""
    monkeypatch.setattr(w4, "_once", lambda *sizes: None)
    x, parts, bias = activations(rows, inner), weight(inner, 72, 128), activations(1, 72)[0].contiguous()
    found, wanted = (torch.full((rows, 72), float("nan"), dtype=x.dtype) for _ in range(2))
    w4.linear_w4(x, *parts, bias, found)
    REFERENCE.linear_w4(x, *parts, bias, wanted)
    close(found, wanted)
    assert not w4.arrivals(torch.device("cpu")).any()


@pytest.mark.parametrize(("inner", "outer", "group"), [(128, 16, 128), (2048, 40, 128), (1536, 33, 256), (2176, 17, 128), (4096, 48, 128)])
def test_one_row_and_long_weight_rows(inner: int, outer: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row, "ENOUGH", 1)
    x, parts, bias = activations(1, inner), weight(inner, outer, group), activations(1, outer)[0].contiguous()
    assert row.serves(x, outer)
    for extra in (bias, None):
        found, wanted = (torch.full((1, outer), float("nan"), dtype=x.dtype) for _ in range(2))
        w4.linear_w4(x, *parts, extra, found)
        REFERENCE.linear_w4(x, *parts, extra, wanted)
        close(found, wanted)


def test_rows_that_begin_anywhere_take_another_kernel() -> None:
    assert not row.serves(activations(1, 260)[:, 2:258], 40) and not row.serves(activations(2, 256), 40)


def test_the_weights_of_known_models_take_the_kernel_that_was_fastest() -> None:
    assert [w4._once(1, *shape) is not None for shape in ((4096, 16), (2048, 64), (4096, 32), (16384, 16), (28672, 32), (4096, 112))] == [True] * 3 + [
        False
    ] * 3
    assert w4._few(1, 4096, 112).splits == 4 and w4._few(9, 4096, 112).splits == 4 and w4._few(1, 28672, 32).splits == 1


def test_split_sums_leave_their_counters_at_zero() -> None:
    w4.linear_w4(activations(1, 4096), *weight(4096, 40, 128), None, torch.empty(1, 40, dtype=torch.float16))
    assert not w4.arrivals(torch.device("cpu")).any()


def test_other_types_take_the_general_kernel() -> None:
    qweight, scales, zeros = weight(256, 40, 128)
    x, found, wanted = activations(2, 256).float(), torch.empty(2, 40), torch.empty(2, 40)
    w4.linear_w4(x, qweight, scales.float(), zeros.float(), None, found)
    REFERENCE.linear_w4(x, qweight, scales.float(), zeros.float(), None, wanted)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_no_rows_are_no_work() -> None:
    w4.linear_w4(activations(0, 256), *weight(256, 40, 128), None, torch.empty(0, 40, dtype=torch.float16))
