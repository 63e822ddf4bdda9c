"""`experts` without a look at the host: (token, choice) pairs sorted by expert on the device, two grouped products, and a sum per token.

A tile is up to BM pairs of one expert. How many tiles there are is known on the device only, so grids have room for the most there can be, and programs without
a tile end at once: a captured step serves every choice of the router. Products of a pair are rounded to the activations' type, as in the reference, and summed
over a token's choices in float32 in their order. Tile sizes follow from the number of rows alone: a row's bits do not depend on what the others choose.
One token needs no sort: all threads multiply it in float32, as in `linear16.py`, and its choices are summed where their products are made.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.linear16 import row_dot
from lmdeploy.kernels.triton_kernels.overlap import after_previous, overlaps

Tensor = torch.Tensor
#: numbers of a row that a program of the sum adds up
BLOCK = 1024
#: longest rows of gate_up that programs of one token hold whole
WHOLE_ROWS = 4096
#: columns of down that a program of one token computes, and the most numbers of weights that it holds at a time
COLUMNS, HELD = 4, 8192


@triton.jit
def _gate_up_of_one_kernel(
    x: tl.tensor, weight: tl.tensor, chosen: tl.tensor, hidden: tl.tensor, N: tl.tensor, K: tl.tensor,
    WHOLE: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """BN numbers (program 0) of a choice (program 1) of the only token: silu(gate) * up of its product with [2N, K]."""
    after_previous(PDL)
    pair, cols, k = tl.program_id(1), tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    row = tl.load(chosen + pair).to(tl.int64) * N * 2 + tl.where(cols < N, cols, 0)
    at, inside = weight + row[:, None] * K + k[None, :], (k < K)[None, :]
    at_up = at + N.to(tl.int64) * K
    tile, up = tl.load(at, mask=inside, other=0.0), tl.load(at_up, mask=inside, other=0.0)
    if WHOLE:
        part = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        total, total_up = tl.sum(tile.to(tl.float32) * part, 1), tl.sum(up.to(tl.float32) * part, 1)
    else:
        acc, acc_up = tl.zeros((BN, BK // 8), dtype=tl.float32), tl.zeros((BN, BK // 8), dtype=tl.float32)
        for start in tl.range(0, K, BK, num_stages=1):
            more = (start + BK + k < K)[None, :]
            tile_next, up_next = tl.load(at + (start + BK), mask=more, other=0.0), tl.load(at_up + (start + BK), mask=more, other=0.0)
            part = tl.load(x + start + k, mask=start + k < K, other=0.0).to(tl.float32)
            acc += row_dot(tile, part, BN, BK)
            acc_up += row_dot(up, part, BN, BK)
            tile, up = tile_next, up_next
        total, total_up = tl.sum(acc, 1), tl.sum(acc_up, 1)
    total = total / (1.0 + tl.exp(-total)) * total_up
    tl.store(hidden + pair * N + cols, total.to(hidden.dtype.element_ty), mask=cols < N)


@triton.jit
def _down_of_one_kernel(
    hidden: tl.tensor, weight: tl.tensor, chosen: tl.tensor, shares: tl.tensor, out: tl.tensor, N: tl.tensor, K: tl.tensor, choices: tl.tensor,
    PLACES: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """BN numbers of the only token: all of its choices at a time, summed with their weights."""
    after_previous(PDL)
    cols, k, pair = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, PLACES)
    live = pair < choices
    expert = tl.load(chosen + pair, mask=live, other=0).to(tl.int64)
    share = tl.load(shares + pair, mask=live, other=0.0).to(tl.float32)
    row = expert[:, None] * N + tl.where(cols < N, cols, 0)[None, :]
    at, at_hidden = weight + row[:, :, None] * K + k[None, None, :], hidden + pair[:, None] * K + k[None, :]
    tile = tl.load(at, mask=live[:, None, None] & (k < K)[None, None, :], other=0.0)
    acc = tl.zeros((PLACES, BN, BK // 8), dtype=tl.float32)
    for start in tl.range(0, K, BK, num_stages=1):
        tile_next = tl.load(at + (start + BK), mask=live[:, None, None] & (start + BK + k < K)[None, None, :], other=0.0)
        part = tl.load(at_hidden + start, mask=live[:, None] & (start + k < K)[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(tl.reshape(tile.to(tl.float32) * part[:, None, :], (PLACES, BN, BK // 8, 8)), 3)
        tile = tile_next
    total = tl.sum(tl.sum(acc, 2) * share[:, None], 0)
    tl.store(out + cols, total.to(out.dtype.element_ty), mask=cols < N)


@triton.jit(do_not_specialize=["pairs", "most"])
def _sort_kernel(
    chosen: tl.tensor, order: tl.tensor, tiles: tl.tensor, pairs: tl.tensor, most: tl.tensor,
    COUNT: tl.constexpr, BINS: tl.constexpr, BM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """Program e lists the pairs of expert e after those of the experts before it, and its tiles (expert, first, end) after theirs.

    A lane looks at every BLOCK-th pair, and lists its own in a run: their order is always the same, and only the lanes' counts are summed up across threads.
    """
    after_previous(PDL)
    expert, lane, bins = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, BINS)
    counts, mine = tl.zeros((BINS,), dtype=tl.int32), tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, pairs, BLOCK):
        inside = start + lane < pairs
        ids = tl.load(chosen + start + lane, mask=inside, other=-1).to(tl.int32)
        counts += tl.histogram(tl.where(inside, ids, 0), BINS, mask=inside)
        mine += (ids == expert).to(tl.int32)
    heights, before = (counts + BM - 1) // BM, bins < expert
    first, count = tl.sum(tl.where(before, counts, 0), 0), tl.sum(mine, 0)
    tile, after = tl.sum(tl.where(before, heights, 0), 0), tl.sum(tl.where(bins <= expert, heights, 0), 0)
    place = first + tl.cumsum(mine, 0) - mine
    for start in range(0, pairs, BLOCK):
        hit = tl.load(chosen + start + lane, mask=start + lane < pairs, other=-1).to(tl.int32) == expert
        tl.store(order + place, start + lane, mask=hit)
        place += hit.to(tl.int32)
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
    SILU: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
) -> None:  # fmt: skip
    """BN columns of a tile's product with its expert's weight [N, K], or with SILU of silu(gate) * up of [2N, K]; the sums [BN, BM] are the result turned.

    SILU: rows of x are tokens, and the results lie as the sort has them. Else rows of x lie so, and the results go to their pairs' places.
    """
    after_previous(PDL)
    tile = tl.program_id(0)
    expert = tl.load(tiles + tile).to(tl.int64)
    if expert < 0:
        return
    cols, k = tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
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


def _shape(pairs: int, count: int, dtype: torch.dtype, silu: bool) -> _Shape:
    """What was fastest on an H200, by the pairs that an expert has on average: few of them wait for its weights, many for the tensor cores."""
    each = pairs // count
    if dtype is torch.float32:
        return _Shape(16 if each <= 8 else 32, 64, 32, 4, 3)
    if each <= 24:
        return _Shape(16, 64, 128, 4, 3 if silu else 4) if each <= 8 else _Shape(32, 64, 128, 4, 4)
    return _Shape(64, 128, 64, 8, 3) if each <= 48 else _Shape(128, 128, 64, 8, 4 if silu else 3)


@cache
def _shared_bytes(device: torch.device) -> int:
    """What a program may have of a multiprocessor's memory."""
    if device.type == "cpu":  # the interpreter
        return 1 << 20
    return int(triton.runtime.driver.active.utils.get_device_properties(device.index or 0)["max_shared_mem"])


def _multiply(x: Tensor, weight: Tensor, out: Tensor, order: Tensor, tiles: Tensor, choices: int, shape: _Shape, silu: bool) -> None:
    """One grouped product of as many tiles as `tiles` has room for."""
    most, (width, inner), pdl = tiles.shape[1], (out.shape[1], x.shape[1]), overlaps(x.device)
    stage = (shape.BM + shape.BN * (2 if silu else 1)) * shape.BK * x.dtype.itemsize
    _product_kernel[(most, triton.cdiv(width, shape.BN))](
        x, weight, out, order, tiles, width, inner, x.stride(0), most, choices, SILU=silu, BM=shape.BM, BN=shape.BN, BK=shape.BK,
        PDL=pdl, launch_pdl=pdl, num_warps=shape.warps, num_stages=max(1, min(shape.stages, _shared_bytes(x.device) // stage)), enable_fp_fusion=True,
    )  # fmt: skip


def _sorted(chosen: Tensor, count: int, height: int) -> tuple[Tensor, Tensor]:
    """The pairs of chosen experts [T, k] in the experts' order [T k], and room for all tiles of `height` pairs that there can be: [3, most]."""
    pairs, pdl = chosen.numel(), overlaps(chosen.device)
    most = pairs // height + min(count, pairs)  # every expert may have one tile that is not full
    order, tiles = (torch.empty(size, dtype=torch.int32, device=chosen.device) for size in (pairs, (3, most)))
    block, warps = (1024, 8) if pairs <= 2048 else (4096, 16)
    _sort_kernel[(count,)](
        chosen, order, tiles, pairs, most, COUNT=count, BINS=max(16, triton.next_power_of_2(count)), BM=height, BLOCK=block,
        PDL=pdl, launch_pdl=pdl, num_warps=warps,
    )  # fmt: skip
    return order, tiles


def _run_one(x: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor, shares: Tensor, out: Tensor) -> None:
    """`experts` of one token."""
    (_, choices), (_, width, inner), pdl = chosen.shape, down.shape, overlaps(x.device)
    hidden, long = x.new_empty(choices, inner), x.shape[1]
    columns, depth = (2, max(8, triton.next_power_of_2(long))) if long <= WHOLE_ROWS else (4, 1024)
    common = {"PDL": pdl, "launch_pdl": pdl, "num_warps": 4, "enable_fp_fusion": True}
    _gate_up_of_one_kernel[(triton.cdiv(inner, columns), choices)](
        x, gate_up, chosen, hidden, inner, long, WHOLE=long <= WHOLE_ROWS, BN=columns, BK=depth, **common
    )
    places = triton.next_power_of_2(choices)
    _down_of_one_kernel[(triton.cdiv(width, COLUMNS),)](
        hidden, down, chosen, shares, out, width, inner, choices, PLACES=places, BN=COLUMNS, BK=max(8, min(256, HELD // (COLUMNS * places))), **common
    )


def experts(x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, expert_weights: Tensor, out: Tensor) -> None:
    """out = sum over the chosen experts of weight * down(silu_mul(gate_up(x))); see `api.Kernels`."""
    (rows, choices), (count, width, inner) = expert_ids.shape, down.shape
    chosen, shares, pairs = expert_ids.contiguous(), expert_weights.contiguous(), rows * choices
    if not pairs:
        return
    if rows == 1:
        _run_one(x, gate_up, down, chosen, shares, out)
        return
    first, second = (_shape(pairs, count, x.dtype, silu) for silu in (True, False))
    order, tiles = _sorted(chosen, count, first.BM)
    hidden, parts, pdl = x.new_empty(pairs, inner), x.new_empty(pairs, width), overlaps(x.device)
    _multiply(x, gate_up, hidden, order, tiles, choices, first, silu=True)
    _multiply(hidden, down, parts, order, tiles, choices, second, silu=False)
    _sum_kernel[(rows, triton.cdiv(width, BLOCK))](
        parts, shares, out, width, choices, BLOCK=min(BLOCK, triton.next_power_of_2(width)), PDL=pdl, launch_pdl=pdl, num_warps=4, enable_fp_fusion=True
    )
