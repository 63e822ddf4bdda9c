"""What `sampling.py` does with one row of logits: whole numbers for weights and order, passes over the row, candidates and their ranks.

A row is read in lines of 32 tokens, for which a grammar's mask has one word. Tokens are compared as packed int64 numbers, and weighed as int64 numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl

MOST = tl.constexpr(1024)  # candidates of a row
GROUPS = tl.constexpr(256)  # of lines: the k-th largest of their maxima is the limit for candidates
STAGES = tl.constexpr(1)  # of the pipeline that reads a row
SHIFT = tl.constexpr(50)  # a sum over candidates has weights below and counts above: 1023 * 2^40 < 2^50
RANK = tl.constexpr(1 << 50)
ONE = tl.constexpr(float(1 << 40))  # the weight of the likeliest token
NONE = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-(1 << 63))
HIGHEST = tl.constexpr((1 << 63) - 1)
NOTHING = tl.constexpr(-0x7F800001 << 32)  # -inf, packed
LAST_ID = tl.constexpr(0x7FFFFFFF)


# -- numbers


@triton.jit
def key_of(x: tl.tensor) -> tl.tensor:
    """int32 in the order of x; -0 is 0, NaN is above all."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, LAST_ID, bits ^ ((bits >> 31) & LAST_ID))


@triton.jit
def value_of(key: tl.tensor) -> tl.tensor:
    """The float32 of a key."""
    return (key ^ ((key >> 31) & LAST_ID)).to(tl.float32, bitcast=True)


@triton.jit
def pack(x: tl.tensor, token: tl.tensor) -> tl.tensor:
    """int64 that falls in the canonical order: logit descending, then id ascending."""
    return (key_of(x).to(tl.int64) << 32) | (token ^ LAST_ID).to(tl.int64)


@triton.jit
def token_of(packed: tl.tensor) -> tl.tensor:
    """The id of a packed token, int64."""
    return (packed & 0xFFFFFFFF) ^ LAST_ID


@triton.jit
def weigh(x: tl.tensor, best: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """int64; `scale` is log2(e) / T."""
    return (tl.exp2((x - best) * scale) * ONE).to(tl.int64)


@triton.jit
def uniform_of(seed: tl.tensor, counter: tl.tensor) -> tl.tensor:
    """float64 in [0, 1), as `uniforms` of the sampler."""
    state = seed.to(tl.uint64, bitcast=True) + 0x9E3779B97F4A7C15
    word = counter.to(tl.uint64, bitcast=True) * 0xD1342543DE82EF95
    for _ in tl.static_range(2):
        state = state ^ word
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB
        state = state ^ (state >> 31)
        word = word * 0 + 0x2545F4914F6CDD1D
    return (state >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def share_of(share: tl.tensor, total: tl.tensor) -> tl.tensor:
    """floor(share * total) in whole weights."""
    return (share.to(tl.float64) * total.to(tl.float64)).to(tl.int64)


@triton.jit
def sum_fours(x: tl.tensor) -> tl.tensor:
    """[ROWS, 8]: what one thread holds of a line, added up, so that sums which are kept take few registers."""
    return tl.sum(tl.reshape(x, (x.shape[0], 8, 4)), 2)


@triton.jit
def sum_all(x: tl.tensor) -> tl.tensor:
    """Over a tile."""
    return tl.sum(tl.sum(x, 1), 0)


# -- passes over a row, in tiles of ROWS lines of 32 tokens: one word of a mask each


@triton.jit
def load_tile(row_ptr: tl.tensor, words_ptr: tl.tensor, masked: tl.tensor, line: tl.tensor, VOCAB: tl.constexpr, MASKS: tl.constexpr) -> tl.tensor:
    """Logits and ids of lines [R, 1]; -inf where nothing is or nothing may come."""
    place = tl.arange(0, 32)[None, :]
    token = line * 32 + place
    x = tl.load(row_ptr + token, mask=token < VOCAB, other=NONE).to(tl.float32)
    if MASKS:  # noqa: SIM102 - a constant of the compiler, then a number on the device
        if masked:
            word = tl.load(words_ptr + line, mask=line * 32 < VOCAB, other=0)
            x = tl.where(((word >> place) & 1) != 0, x, NONE)
    return x, token


@triton.jit
def find_best(
    row_ptr: tl.tensor, words_ptr: tl.tensor, masked: tl.tensor, scratch_ptr: tl.tensor, drawn: tl.tensor,
    VOCAB: tl.constexpr, ROWS: tl.constexpr, MASKS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The first of the canonical order, packed (of NaN where there is one), and the maxima of GROUPS groups. With `drawn` the lines' maxima are noted."""
    most = tl.full((ROWS, 32), NONE, tl.float32)
    at = tl.zeros((ROWS, 32), tl.int32)
    lines = tl.arange(0, ROWS)
    for start in tl.range(0, (VOCAB + 31) // 32, ROWS, num_stages=STAGES):
        x, token = load_tile(row_ptr, words_ptr, masked, (start + lines)[:, None], VOCAB, MASKS)
        at = tl.where(x > most, token, at)
        most = tl.maximum(most, x, propagate_nan=tl.PropagateNan.ALL)
        if drawn:
            tl.store(line_maxima(scratch_ptr) + start + lines, tl.max(x, 1), mask=(start + lines) * 32 < VOCAB)
    first = tl.max(tl.max(pack(most, at), 1), 0)
    groups = tl.max(most, 1)
    if ROWS > GROUPS:
        groups = tl.max(tl.reshape(groups, (GROUPS, ROWS // GROUPS)), 1)
    return first, groups


@triton.jit
def count_above(
    row_ptr: tl.tensor, words_ptr: tl.tensor, masked: tl.tensor, low: tl.tensor, best: tl.tensor, scale: tl.tensor,
    VOCAB: tl.constexpr, ROWS: tl.constexpr, MASKS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Number and weight of the tokens x >= low."""
    count = tl.zeros((ROWS, 8), tl.int32)
    total = tl.zeros((ROWS, 8), tl.int64)
    for start in tl.range(0, (VOCAB + 31) // 32, ROWS, num_stages=STAGES):
        x, _ = load_tile(row_ptr, words_ptr, masked, (start + tl.arange(0, ROWS))[:, None], VOCAB, MASKS)
        count += sum_fours((x >= low).to(tl.int32))
        total += sum_fours(tl.where(x >= low, weigh(x, best, scale), 0))
    return sum_all(count), sum_all(total)


# -- the work space of a slot: MOST candidates; what is before each, and earlier the lines to look at; a number for each line of the row


@triton.jit
def line_list(scratch_ptr: tl.tensor) -> tl.tensor:
    """The lines to look at, int32 [MOST]."""
    return (scratch_ptr + MOST).to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def line_maxima(scratch_ptr: tl.tensor) -> tl.tensor:
    """The maximum of each line, float32."""
    return (scratch_ptr + 2 * MOST).to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def number(inside: tl.tensor, base: tl.tensor) -> tl.tensor:
    """Places for what is inside of a tile [R, 32], from `base` on, and where the next tile goes on. No atomics: their order would be another one each time."""
    ones = inside.to(tl.int32)
    lines = tl.sum(ones, 1)
    before = tl.cumsum(lines, 0) - lines
    return base + before[:, None] + tl.cumsum(ones, 1) - ones, base + tl.sum(lines, 0)


@triton.jit
def collect(
    row_ptr: tl.tensor, words_ptr: tl.tensor, masked: tl.tensor, scratch_ptr: tl.tensor, low: tl.tensor, high: tl.tensor,
    VOCAB: tl.constexpr, ROWS: tl.constexpr, MASKS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Note the tokens low <= x < high; their number."""
    count = 0
    tl.debug_barrier()
    for start in tl.range(0, (VOCAB + 31) // 32, ROWS, num_stages=STAGES):
        x, token = load_tile(row_ptr, words_ptr, masked, (start + tl.arange(0, ROWS))[:, None], VOCAB, MASKS)
        inside = (x >= low) & (x < high)
        place, count = number(inside, count)
        tl.store(scratch_ptr + place, pack(x, token), mask=inside & (place < MOST))
    tl.debug_barrier()
    return count


@triton.jit
def collect_front(
    row_ptr: tl.tensor, words_ptr: tl.tensor, masked: tl.tensor, scratch_ptr: tl.tensor, low: tl.tensor,
    VOCAB: tl.constexpr, MASKS: tl.constexpr, FOLD: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Note the tokens x >= low, of the lines whose maximum is; their number, or more than MOST."""
    found = 0
    place = tl.arange(0, 32)[None, :]
    tl.debug_barrier()
    for start in range(0, (VOCAB + 31) // 32, FOLD * 32):
        line = start + tl.arange(0, FOLD)[:, None] * 32 + place
        most = tl.load(line_maxima(scratch_ptr) + line, mask=line * 32 < VOCAB, other=NONE)
        inside = (most >= low) & (most > NONE)
        to, found = number(inside, found)
        tl.store(line_list(scratch_ptr) + to, line, mask=inside & (to < MOST))
    tl.debug_barrier()
    count = 0
    if found <= MOST:
        for start in range(0, found, 64):
            lanes = start + tl.arange(0, 64)
            line = tl.load(line_list(scratch_ptr) + lanes, mask=lanes < found, other=0)
            x, token = load_tile(row_ptr, words_ptr, masked, line[:, None], VOCAB, MASKS)
            inside = (x >= low) & (x > NONE) & (lanes < found)[:, None]
            to, count = number(inside, count)
            tl.store(scratch_ptr + to, pack(x, token), mask=inside & (to < MOST))
        tl.debug_barrier()
    else:
        count = MOST + 1
    return count


@triton.jit
def reach(groups: tl.tensor, count: tl.tensor) -> tl.tensor:
    """The count-th largest of the groups' maxima: at least so many tokens are not below it."""
    above = tl.sum((groups[None, :] >= groups[:, None]).to(tl.int32), 1)
    return tl.max(tl.where(above >= count, groups, NONE), 0)


@triton.jit
def rank_pairs(scratch_ptr: tl.tensor, count: tl.tensor, best: tl.tensor, scale: tl.tensor, PAIRS: tl.constexpr) -> None:
    """For each noted token the sum over those before it, of weights and of ones above SHIFT."""
    lanes = tl.arange(0, PAIRS)
    for first in range(0, count, PAIRS):
        mine = tl.load(scratch_ptr + first + lanes, mask=first + lanes < count, other=LOWEST)
        total = tl.zeros((PAIRS, PAIRS), tl.int64)
        for second in range(0, count, PAIRS):
            other = tl.load(scratch_ptr + second + lanes, mask=second + lanes < count, other=NOTHING)
            one = tl.where(second + lanes < count, weigh(value_of((other >> 32).to(tl.int32)), best, scale) + RANK, 0)
            total += tl.where(other[None, :] > mine[:, None], one[None, :], 0)
        tl.store(scratch_ptr + MOST + first + lanes, tl.sum(total, 1), mask=first + lanes < count)
    tl.debug_barrier()


@triton.jit
def load_noted(scratch_ptr: tl.tensor, count: tl.tensor, best: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """The noted tokens, packed, and their weights, 0 past the end."""
    lanes = tl.arange(0, MOST)
    packed = tl.load(scratch_ptr + lanes, mask=lanes < count, other=NOTHING)
    weight = tl.where(lanes < count, weigh(value_of((packed >> 32).to(tl.int32)), best, scale), 0)
    return tl.where(lanes < count, packed, HIGHEST), weight


@triton.jit
def load_before(scratch_ptr: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Weight and number of what comes before each noted token."""
    lanes = tl.arange(0, MOST)
    both = tl.load(scratch_ptr + MOST + lanes, mask=lanes < count, other=HIGHEST)
    return both & (RANK - 1), both >> SHIFT


# -- in the order of the ids


@triton.jit
def weigh_lines(
    row_ptr: tl.tensor, words_ptr: tl.tensor, masked: tl.tensor, scratch_ptr: tl.tensor, low: tl.tensor, least: tl.tensor, best: tl.tensor, high: tl.tensor,
    scale: tl.tensor, VOCAB: tl.constexpr, ROWS: tl.constexpr, MASKS: tl.constexpr,
) -> None:  # fmt: skip
    """Note the weight of each line's tokens low <= x <= high that weigh `least` or more each."""
    lines = tl.arange(0, ROWS)
    tl.debug_barrier()
    for start in tl.range(0, (VOCAB + 31) // 32, ROWS, num_stages=STAGES):
        x, _ = load_tile(row_ptr, words_ptr, masked, (start + lines)[:, None], VOCAB, MASKS)
        weight = weigh(x, best, scale)
        weight = tl.sum(tl.where((x >= low) & (x <= high) & (weight >= least), weight, 0), 1)
        tl.store(scratch_ptr + 2 * MOST + start + lines, weight, mask=(start + lines) * 32 < VOCAB)
    tl.debug_barrier()


@triton.jit
def load_line_weights(scratch_ptr: tl.tensor, VOCAB: tl.constexpr, FOLD: tl.constexpr) -> tl.tensor:
    """What `weigh_lines` noted, [FOLD * 32]."""
    lines = tl.arange(0, FOLD * 32)
    return tl.load(scratch_ptr + 2 * MOST + lines, mask=lines * 32 < VOCAB, other=0)


@triton.jit
def last_within(weights: tl.tensor, goal: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """The last place with no more than `goal` before it, and what is before it."""
    before = tl.cumsum(weights, 0) - weights
    place = tl.max(tl.where(before <= goal, tl.arange(0, SIZE), 0), 0)
    return place, tl.sum(tl.where(tl.arange(0, SIZE) == place, before, 0), 0)


@triton.jit
def walk(
    row_ptr: tl.tensor, words_ptr: tl.tensor, masked: tl.tensor, lines: tl.tensor, goal: tl.tensor, low: tl.tensor, least: tl.tensor, best: tl.tensor,
    high: tl.tensor, scale: tl.tensor, VOCAB: tl.constexpr, MASKS: tl.constexpr, FOLD: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The last of the tokens of `weigh_lines` with no more than `goal` before it."""
    line, before = last_within(lines, goal, FOLD * 32)
    x, _ = load_tile(row_ptr, words_ptr, masked, tl.full((1, 1), 0, tl.int32) + line, VOCAB, MASKS)
    weight = weigh(x, best, scale)
    weight = tl.sum(tl.where((x >= low) & (x <= high) & (weight >= least), weight, 0), 0)
    place, _ = last_within(weight, goal - before, 32)
    return line * 32 + place
