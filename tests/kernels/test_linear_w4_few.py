"""The Gluon kernel of few rows in 4 bits without a GPU: compiled for Hopper, and what was compiled run on the CPU (ptx_machine.py) against float64."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

from tests.kernels.ptx_alu import Array, narrow, wide
from tests.kernels.ptx_machine import Machine, Memory

compiler = pytest.importorskip("triton.compiler", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)
from triton.backends.compiler import GPUTarget  # noqa: E402

few = pytest.importorskip("lmdeploy.kernels.triton_kernels.linear_w4_few", reason="a Triton without Gluon")
plans = pytest.importorskip("lmdeploy.kernels.triton_kernels.linear_w4_few_plan")
source_of = pytest.importorskip("triton.experimental.gluon._runtime").GluonASTSource

TYPES = {
    **dict.fromkeys(("x", "qweight", "arrived"), "*i32"),
    **dict.fromkeys(("bias", "out", "residual", "gain"), "*bf16"),
    **dict.fromkeys(("before", "squares"), "*i64"),
    **dict.fromkeys(("T", "N", "x_row", "out_row", "tiles"), "i32"),
    "scales": "*fp16",
    "zeros": "*u8",
    "parts": "*fp32",
    "eps": "fp32",
}


def compiled(launch: Any, product: Product) -> Any:
    kernel, flags = few._few_kernel, product.flags
    constants = plans.constants(launch, product.rows, product.outer, product.inner)
    constants = {**constants, "HAS_BIAS": flags["bias"], "SILU": flags["silu"], "BEFORE": flags["before"], "AFTER": flags["after"]}
    names: list[str] = kernel.arg_names
    aligned: dict[Any, Any] = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if TYPES.get(n, " ")[0] == "*" or n in ("N", "x_row", "out_row")}
    signature = {name: TYPES.get(name, "constexpr") for name in names}
    source = source_of(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    return compiler.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": launch.warps})


class Product:
    """A product of random numbers, its parts as they lie in memory, and what is right."""

    def __init__(self, rows: int, outer: int, inner: int, *, bias: bool, silu: bool, before: bool, after: bool) -> None:
        made = np.random.default_rng(0)
        self.flags = {"bias": bias, "silu": silu, "before": before, "after": after}
        self.rows, self.outer, self.inner, self.width = rows, outer, inner, outer // 2 if silu else outer
        self.x, self.bias, self.residual, self.gain = (
            narrow(made.standard_normal(shape)).astype(np.uint16) for shape in ((rows, inner), outer, (rows, outer), outer)
        )
        self.qweight = made.integers(0, 256, (outer, inner // 2), dtype=np.uint8)
        self.scales = (made.random((outer, inner // plans.TILE)) * 0.02 + 0.001).astype(np.float16)
        self.zeros = made.integers(0, 16, self.scales.shape, dtype=np.uint8)
        self.given = (made.random(rows) * inner * 2**24).astype(np.int64)
        self.out, self.left, self.squares = self._wanted()

    def _wanted(self) -> tuple[Array, Array, Array]:
        """The result, the new residual and its rows' squares."""
        numbers = np.stack([self.qweight & 15, self.qweight >> 4], -1).reshape(*self.scales.shape, plans.TILE) - self.zeros[..., None].astype(float)
        out = wide(self.x).astype(float) @ (numbers * self.scales[..., None]).reshape(self.outer, -1).T
        if self.flags["before"]:
            out /= np.sqrt(self.given[:, None] / 2**24 / self.inner + 1e-5)
        if self.flags["bias"]:
            out += wide(self.bias)
        left = wide(narrow(wide(self.residual) + wide(narrow(out)).reshape(out.shape))).reshape(out.shape)
        if self.flags["after"]:
            out = left * wide(self.gain)
        if self.flags["silu"]:
            gate, up = out[:, : self.width], out[:, self.width :]
            out = gate / (1 + np.exp(-gate)) * up
        return out, left, (left.astype(float) ** 2).sum(1)

    def run(self, kernel: Any, launch: Any, rows: slice, *, late: bool) -> tuple[Array, Array, Array, Array]:
        """(out, residual, squares, arrived) of some of the rows."""
        memory, machine, count = Memory(16 << 20), Machine(kernel.asm["ptx"], 32 * launch.warps), len(range(self.rows)[rows])
        out, squares = np.full((count, self.width), 0x7FC0, np.uint16), np.zeros(16, np.int64)
        parts, arrived = np.zeros((launch.splits, count, self.outer), np.float32), np.zeros(256, np.int32)
        put = memory.put
        results = [put(out), put(parts), put(arrived), put(self.residual[rows]), put(squares)]
        at_out, at_parts, at_arrived, at_residual, at_squares = results
        operands = [
            put(self.x[rows]),
            put(self.qweight),
            put(self.scales),
            put(self.zeros),
            put(self.bias),
            at_out,
            at_parts,
            at_arrived,
            put(self.given[rows]),
        ]
        eps = int(np.float32(1e-5).view(np.uint32))
        arguments = [*operands, eps, at_residual, put(self.gain), at_squares, count, self.outer, self.inner // 2, self.width, self.outer // 16]
        machine.run(memory, arguments, (launch.programs, launch.splits), late=late)
        assert not machine.races
        return wide(memory.get(at_out, out)), memory.get(at_residual, self.residual[rows]), memory.get(at_squares, squares), memory.get(at_arrived, arrived)


def error(found: Array, wanted: Array) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


#: rows, tiles, inner, launch (warps, splits, steps of the ring, programs, groups a step), and what stands around: each kind of line of steps (a part of a tile,
#: more than one, tiles that programs do not share evenly), sums that are shared, one row, two blocks of rows, rings that are longer than the line.
CASES = [
    (8, 14, 4096, (16, 1, 3, 1, 2), {"silu": True, "before": True}),
    (5, 27, 4096, (8, 1, 3, 2), {"silu": True, "before": True}),
    (1, 6, 4096, (4, 1, 3, 6, 4), {"bias": True, "before": True}),
    (1, 7, 4096, (8, 1, 5, 1, 2), {"silu": True, "before": True}),
    (7, 4, 14336, (8, 2, 6, 1), {"after": True}),
    (1, 3, 14336, (8, 1, 4, 3, 2), {"after": True}),
    (8, 13, 14336, (8, 7, 3, 2, 2), {"after": True}),
    (16, 5, 14336, (8, 7, 3, 1), {"after": True}),
    (13, 8, 2048, (8, 1, 4, 1, 2), {"bias": True, "silu": True}),
    (1, 4, 2048, (4, 1, 2, 4, 4), {"after": True}),
    (1, 9, 8192, (8, 1, 3, 4, 4), {"after": True}),
    (4, 5, 5120, (8, 1, 4, 2), {"bias": True, "after": True}),  # scales in other pieces
]


@pytest.mark.parametrize(("rows", "tiles", "inner", "launch", "around"), CASES)
def test_what_is_compiled_for_hopper_is_right_whatever_the_order_of_copies(
    rows: int, tiles: int, inner: int, launch: tuple[int, ...], around: dict[str, bool]
) -> None:
    plan = plans.Launch(*launch)
    product = Product(rows, 16 * tiles, inner, **{"bias": False, "silu": False, "before": False, "after": False, **around})
    kernel = compiled(plan, product)
    for late in (False, True):
        out, left, squares, arrived = product.run(kernel, plan, slice(None), late=late)
        assert error(out, product.out) < 3e-3 and not arrived.any()
        if product.flags["after"]:
            assert (wide(left).reshape(product.left.shape) == product.left).all()
            assert np.allclose(squares[:rows] / 2**24, product.squares, rtol=1e-5)


def test_a_row_has_the_same_bits_among_others() -> None:
    plan, product = plans.Launch(8, 2, 3, 2), Product(8, 80, 4096, bias=False, silu=False, before=True, after=False)
    kernel = compiled(plan, product)
    alone = compiled(plan, Product(1, 80, 4096, bias=False, silu=False, before=True, after=False))
    together = product.run(kernel, plan, slice(None), late=False)[0]
    assert (product.run(kernel, plan, slice(3, 6), late=False)[0] == together[3:6]).all()
    assert (product.run(alone, plan, slice(4, 5), late=False)[0] == together[4:5]).all()


SHAPES = [
    (28672, 4096),
    (6144, 4096),
    (4096, 4096),
    (4096, 14336),
    (16384, 2048),
    (4096, 2048),
    (2048, 8192),
    (2048, 2048),
    (27648, 5120),
    (92544, 4096),
    (5120, 13824),
]


def test_launches_fit_the_chip_and_are_the_same_for_2_to_8_and_for_9_to_16_rows() -> None:
    for outer, inner in SHAPES:
        launches = [plans.launch_of(rows, outer, inner) for rows in range(1, 17)]
        assert len(set(launches[1:8])) == len(set(launches[8:])) == 1
        for rows, launch in enumerate(launches, 1):
            if launch is None:
                assert (outer, inner) == (5120, 13824) or rows > 8 and (outer, inner) == (92544, 4096)
                continue
            groups = inner // plans.TILE // launch.splits
            assert plans.size(launch, rows, outer, inner) <= 227 << 10 and launch.programs <= outer // 16 and outer // 16 <= launch.programs * 32
            assert inner // plans.TILE % launch.splits == groups % (launch.warps * launch.groups) == 0 and launch.warps * launch.programs * launch.splits >= 512
    assert plans.launch_of(8, 1024, 2048) is None and plans.launch_of(1, 4096, 11008) is None
