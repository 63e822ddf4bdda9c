"""What the kernels share: rows of a head in two halves, the numbers of a quantised cache row, the rotation.

A row of D dims is held as two tensors, its lower and its upper D/2 dims, each padded to a power of two: a 4-bit byte holds one dim of either
half, so it is packed and unpacked without moving anything between threads. Padded dims are zero wherever they enter a product.
The numbers agree with `kv_quant.py` bit by bit when the kernel is compiled with enable_fp_fusion=False.
"""

from __future__ import annotations

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)
TINY = tl.constexpr(2.0**-126)
#: Adding and taking away 1.5 * 2^23 rounds a float32 below 2^22 to the nearest whole number, halves to even.
ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def floor_bf16(x: tl.tensor) -> tl.tensor:
    """The largest bfloat16 that is not above x, as float32."""
    bits = x.to(tl.int32, bitcast=True)
    lower = ((bits & 0xFFFF) != 0) & (bits < 0)  # cutting the low bits moves negative numbers up
    floored = ((bits & -0x10000) + lower.to(tl.int32) * 0x10000).to(tl.float32, bitcast=True)
    return tl.where(x != x, x, floored)


@triton.jit
def ceil_bf16(x: tl.tensor) -> tl.tensor:
    """The smallest bfloat16 that is not below x, as float32."""
    return -floor_bf16(-x)


@triton.jit
def as_word(scale: tl.tensor, offset: tl.tensor) -> tl.tensor:
    """float32 numbers that bfloat16 holds exactly, as two bfloat16 in one int32, the scale first in memory."""
    return ((scale.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) | (offset.to(tl.int32, bitcast=True) & -0x10000)


@triton.jit
def nearest(x: tl.tensor) -> tl.tensor:
    """x rounded to a whole number, halves to even."""
    return (x + ROUNDER) - ROUNDER


@triton.jit
def to_levels(x: tl.tensor, scale: tl.tensor, offset: tl.tensor, LEVELS: tl.constexpr) -> tl.tensor:
    """int32 [n, P] in 0..LEVELS: (x - offset) / scale to the nearest; what is no number becomes 0."""
    number = nearest(tl.div_rn(x - offset[:, None], tl.broadcast_to(scale[:, None], x.shape)))
    number = tl.where(number != number, 0.0, number)
    return tl.minimum(tl.maximum(number, 0.0), LEVELS).to(tl.int32)


@triton.jit
def to_fp8(x: tl.tensor) -> tl.tensor:
    """The byte of the nearest float8_e4m3fn as int32, |x| <= 448: 4 bits of exponent (bias 7), 3 of mantissa, subnormals in steps of 2^-9.

    By hand, so that chips without that type and Triton's interpreter, which rounds otherwise, give the same byte.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = nearest(tl.abs(x) * 512.0).to(tl.int32)
    byte = tl.where(tl.abs(x) < 0.015625, small, normal)
    return tl.where(x != x, 0x7F, byte) | ((bits >> 24) & 0x80)


@triton.jit
def row_scales(lo: tl.tensor, hi: tl.tensor, inside: tl.tensor, WIDTH: tl.constexpr, LEVELS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Scale and offset [n] of rows, bfloat16 numbers in float32. `inside` [P]: dims that are no padding."""
    bad = tl.max(((lo != lo) | (hi != hi)).to(tl.int32), 1) > 0  # min and max pass over NaN
    nan = float("nan")
    if WIDTH == "fp8":
        most = tl.maximum(tl.max(tl.abs(lo), 1), tl.max(tl.abs(hi), 1))
        offset = tl.zeros_like(most)
        scale = ceil_bf16(tl.div_rn(most, tl.full(most.shape, FP8_MAX, tl.float32)))
    else:
        kept, infinity = inside[None, :], float("inf")
        lowest = tl.minimum(tl.min(tl.where(kept, lo, infinity), 1), tl.min(tl.where(kept, hi, infinity), 1))
        most = tl.maximum(tl.max(tl.where(kept, lo, -infinity), 1), tl.max(tl.where(kept, hi, -infinity), 1))
        offset = tl.where(bad, nan, floor_bf16(lowest))
        scale = ceil_bf16(tl.div_rn(most - offset, tl.full(most.shape, LEVELS, tl.float32)))
    scale = tl.where(scale < TINY, TINY, scale)
    return tl.where(bad, nan, scale), offset


@triton.jit
def signs(SIZE: tl.constexpr, TYPE: tl.constexpr) -> tl.tensor:
    """Sylvester's Hadamard matrix [SIZE, SIZE] of 1 and -1, without a load: the parity of the bits that row and column share. SIZE is at most 256."""
    shared = tl.arange(0, SIZE)[:, None] & tl.arange(0, SIZE)[None, :]
    shared = shared ^ (shared >> 4)
    shared = shared ^ (shared >> 2)
    shared = shared ^ (shared >> 1)
    return (1 - 2 * (shared & 1)).to(TYPE)


@triton.jit
def turned(
    lo: tl.tensor, hi: tl.tensor, rotation_ptr: tl.tensor, TYPE: tl.constexpr, HALF: tl.constexpr, PADDED: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Rows [n, D] times the rotation [D, D], float32. Rows of a 16-bit TYPE hold numbers of it.

    Where D is a power of two the rotation is a Hadamard matrix: two products with signs, which are exact in 16 bit, give what a float32 product gives.
    Elsewhere they are float32 of three TF32 products each.
    """
    if HALF == PADDED:
        matrix = signs(HALF, TYPE)
        below = tl.dot(lo.to(TYPE), matrix, input_precision="tf32x3")
        above = tl.dot(hi.to(TYPE), matrix, input_precision="tf32x3")
        new_lo, new_hi = (below + above) * ((2 * HALF) ** -0.5), (below - above) * ((2 * HALF) ** -0.5)
    else:
        lo, hi = lo.to(tl.float32), hi.to(tl.float32)
        dim = tl.arange(0, PADDED)
        inside = (dim < HALF)[:, None] & (dim < HALF)[None, :]
        corner = rotation_ptr + dim[:, None] * (2 * HALF) + dim[None, :]
        below_ptr = corner + HALF * (2 * HALF)
        new_lo = tl.dot(lo, tl.load(corner, mask=inside, other=0.0), input_precision="tf32x3")
        new_lo = tl.dot(hi, tl.load(below_ptr, mask=inside, other=0.0), new_lo, input_precision="tf32x3")
        new_hi = tl.dot(lo, tl.load(corner + HALF, mask=inside, other=0.0), input_precision="tf32x3")
        new_hi = tl.dot(hi, tl.load(below_ptr + HALF, mask=inside, other=0.0), new_hi, input_precision="tf32x3")
    return new_lo, new_hi


@triton.jit
def _butterflies(x: tl.tensor, ROWS: tl.constexpr, STEP: tl.constexpr) -> tl.tensor:
    a, b = tl.split(tl.permute(tl.reshape(x, (ROWS, 32 // STEP, 2, STEP)), (0, 1, 3, 2)))
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2)), (ROWS, 64))


@triton.jit
def _hadamard(x: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """Rows [ROWS, 64] times Sylvester's Hadamard matrix of 1 and -1."""
    x = _butterflies(_butterflies(x, ROWS, 1), ROWS, 2)
    x = _butterflies(_butterflies(x, ROWS, 4), ROWS, 8)
    return _butterflies(_butterflies(x, ROWS, 16), ROWS, 32)


@triton.jit
def turned_128(lo: tl.tensor, hi: tl.tensor, ROWS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """`turned` of rows of 128 dims by sums and differences, in float32: for few rows, or for one warp, which has no room for a matrix."""
    below, above = _hadamard(lo.to(tl.float32), ROWS), _hadamard(hi.to(tl.float32), ROWS)
    return (below + above) * (128**-0.5), (below - above) * (128**-0.5)
