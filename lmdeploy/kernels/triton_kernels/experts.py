"""`experts` without a look at the host: (token, choice) pairs sorted by expert on the device, two grouped products, and a sum per token.

A tile is up to BM pairs of one expert. How many tiles there are is known on the device only, so grids have room for the most there can be, and programs without
a tile end at once: a captured step serves every choice of the router. Products of a pair are rounded to the activations' type, as in the reference, and summed
over a token's choices in float32 in their order. Tile sizes follow from the number of rows alone: a row's bits do not depend on what the others choose.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.overlap import after_previous, overlaps

Tensor = torch.Tensor
#: pairs that a program of the sort looks at together, and numbers of a row that one of the sum adds up
PAIRS, BLOCK = 1024, 1024


@triton.jit(do_not_specialize=["pairs", "most"])
def _sort_kernel(
    chosen: tl.tensor, order: tl.tensor, tiles: tl.tensor, pairs: tl.tensor, most: tl.tensor,
    COUNT: tl.constexpr, BINS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Program e lists the pairs of expert e in their order, after those of the experts before it, and its tiles (expert, first, end) after theirs."""
    after_previous(PDL)
    expert, lane, bins = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, BINS)
    counts = tl.zeros((BINS,), dtype=tl.int32)
    for start in range(0, pairs, BLOCK):
        ids = tl.load(chosen + start + lane, mask=start + lane < pairs, other=0).to(tl.int32)
        counts += tl.histogram(ids, BINS, mask=start + lane < pairs)
    heights, before = (counts + BM - 1) // BM, bins < expert
    first, count = tl.sum(tl.where(before, counts, 0), 0), tl.sum(tl.where(bins == expert, counts, 0), 0)
    tile, after = tl.sum(tl.where(before, heights, 0), 0), tl.sum(tl.where(bins <= expert, heights, 0), 0)
    place = first
    for start in range(0, pairs, BLOCK):
        mine = (start + lane < pairs) & (tl.load(chosen + start + lane, mask=start + lane < pairs, other=0) == expert)
        tl.store(order + place + tl.cumsum(mine.to(tl.int32), 0) - 1, start + lane, mask=mine)
        place += tl.sum(mine.to(tl.int32), 0)
    stop = after
    if expert == COUNT - 1:
        stop = most  # the last program also says which tiles there are not
    for start in range(tile, stop, BLOCK):
        number = start + lane
        inside = number < stop
        begin = first + (number - tile) * BM
        tl.store(tiles + number, tl.where(number < after, expert, -1), mask=inside)
        tl.store(tiles + most + number, begin, mask=inside)
        tl.store(tiles + 2 * most + number, tl.minimum(begin + BM, first + count), mask=inside)


@triton.jit(do_not_specialize=["most", "choices"])
def _product_kernel(
    x: tl.tensor, weight: tl.tensor, out: tl.tensor, order: tl.tensor, tiles: tl.tensor,
    N: tl.tensor, K: tl.tensor, x_row: tl.tensor, most: tl.tensor, choices: tl.tensor,
    SILU: tl.constexpr, ALONE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """BN columns of a tile's product with its expert's weight [N, K], or with SILU of silu(gate) * up of [2N, K]; the sums [BN, BM] are the result turned.

    SILU: rows of x are tokens, and the results lie as the sort has them. Else rows of x lie so, and the results go to their pairs' places.
    ALONE: one token, whose pairs are tiles of their own: `tiles` are the chosen experts.
    """
    after_previous(PDL)
    tile = tl.program_id(0)
    expert = tl.load(tiles + tile).to(tl.int64)
    if expert < 0:
        return
    cols, k = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    if ALONE:
        rows = tile + tl.arange(0, BM)
        live, pair = rows == tile, rows
    else:
        rows = tl.load(tiles + most + tile) + tl.arange(0, BM)
        live = rows < tl.load(tiles + 2 * most + tile)
        pair = tl.load(order + rows, mask=live, other=0)
    source, target = rows, pair
    if SILU:
        source, target = pair // choices, rows
    base = weight + expert * N * K * (2 if SILU else 1)
    at = base + tl.where(cols < N, cols, 0).to(tl.int64)[:, None] * K + k[None, :]
    at_x = x + source.to(tl.int64)[None, :] * x_row + k[:, None]
    acc, up = tl.zeros((BN, BM), dtype=tl.float32), tl.zeros((BN, BM), dtype=tl.float32)
    for start in range(0, K, BK):
        inside = start + k < K
        part = tl.load(at_x + start, mask=live[None, :] & inside[:, None], other=0.0)
        acc = tl.dot(tl.load(at + start, mask=inside[None, :], other=0.0), part, acc, input_precision="ieee")
        if SILU:
            up = tl.dot(tl.load(at + N.to(tl.int64) * K + start, mask=inside[None, :], other=0.0), part, up, input_precision="ieee")
    if SILU:
        acc = acc / (1.0 + tl.exp(-acc)) * up
    tl.store(out + target.to(tl.int64)[None, :] * N + cols[:, None], acc.to(out.dtype.element_ty), mask=(cols < N)[:, None] & live[None, :])


@triton.jit(do_not_specialize=["choices"])
def _sum_kernel(parts: tl.tensor, weights: tl.tensor, out: tl.tensor, width: tl.tensor, choices: tl.tensor, BLOCK: tl.constexpr, PDL: tl.constexpr) -> None:
    """BLOCK numbers of a token: the products of its pairs, each times its weight, one after the other."""
    after_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for pair in range(token * choices, token * choices + choices):
        part = tl.load(parts + pair * width + place, mask=place < width, other=0.0)
        total += part.to(tl.float32) * tl.load(weights + pair).to(tl.float32)
    tl.store(out + token * width + place, total.to(out.dtype.element_ty), mask=place < width)


class _Shape(NamedTuple):
    """A tile's pairs, columns and depth, and how many warps and pipeline stages work on it."""

    BM: int
    BN: int
    BK: int
    warps: int
    stages: int


def _shape(pairs: int, count: int, dtype: torch.dtype) -> _Shape:
    """By the pairs that an expert has on average: few of them wait for its weights, many for the tensor cores."""
    each = pairs // count
    if dtype is torch.float32:
        return _Shape(16 if each <= 8 else 32, 64, 32, 4, 3)
    height = 16 if each <= 8 else 32 if each <= 24 else 64 if each <= 64 else 128
    return _Shape(height, 64, 128, 4, 3) if height <= 32 else _Shape(height, 128, 64, 8, 3)


@cache
def _shared_bytes(device: torch.device) -> int:
    """What a program may have of a multiprocessor's memory."""
    if device.type == "cpu":  # the interpreter
        return 1 << 20
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])


def _multiply(x: Tensor, weight: Tensor, out: Tensor, order: Tensor, tiles: Tensor, choices: int, shape: _Shape, silu: bool, alone: bool) -> None:
    """One grouped product of as many tiles as `tiles` has room for."""
    most, (width, inner), pdl = tiles.shape[-1], (out.shape[1], x.shape[1]), overlaps(x.device)
    stage = (shape.BM + shape.BN * (2 if silu else 1)) * shape.BK * x.dtype.itemsize
    _product_kernel[(most, triton.cdiv(width, shape.BN))](
        x, weight, out, order, tiles, width, inner, x.stride(0), most, choices, SILU=silu, ALONE=alone, BM=shape.BM, BN=shape.BN, BK=shape.BK,
        PDL=pdl, launch_pdl=pdl, num_warps=shape.warps, num_stages=max(1, min(shape.stages, _shared_bytes(x.device) // stage)), enable_fp_fusion=True,
    )  # fmt: skip


def experts(x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, expert_weights: Tensor, out: Tensor) -> None:
    """out = sum over the chosen experts of weight * down(silu_mul(gate_up(x))); see `api.Kernels`."""
    (rows, choices), (count, width, inner) = expert_ids.shape, down.shape
    pairs = rows * choices
    if not pairs:
        return
    chosen, shares = expert_ids.contiguous(), expert_weights.contiguous()
    pdl, shape, alone = overlaps(x.device), _shape(pairs, count, x.dtype), rows == 1
    if alone:
        order = tiles = chosen.view(-1)
    else:
        most = pairs // shape.BM + min(count, pairs)  # every expert may have one tile that is not full
        order, tiles = (torch.empty(size, dtype=torch.int32, device=x.device) for size in (pairs, (3, most)))
        _sort_kernel[(count,)](
            chosen, order, tiles, pairs, most, COUNT=count, BINS=max(16, triton.next_power_of_2(count)), BM=shape.BM, BLOCK=PAIRS,
            PDL=pdl, launch_pdl=pdl, num_warps=8,
        )  # fmt: skip
    hidden, parts = x.new_empty(pairs, inner), x.new_empty(pairs, width)
    _multiply(x, gate_up, hidden, order, tiles, choices, shape, silu=True, alone=alone)
    _multiply(hidden, down, parts, order, tiles, choices, shape, silu=False, alone=alone)
    _sum_kernel[(rows, triton.cdiv(width, BLOCK))](
        parts, shares, out, width, choices, BLOCK=min(BLOCK, triton.next_power_of_2(width)), PDL=pdl, launch_pdl=pdl, num_warps=4, enable_fp_fusion=True
    )
