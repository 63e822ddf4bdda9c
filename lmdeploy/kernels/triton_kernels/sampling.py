"""`choose_tokens`: the next token of every row in one launch, a program a row, without a sort and without a look from the host; part of a CUDA graph.

What is chosen is what `engine/sampler.py` defines. Weights are whole numbers, floor(2^40 e^((x - max) / T)): their sums are exact and do not depend on
the order of adding, so a row's token depends on nothing but the row, whatever order atomics put its candidates in. Passes over the row: (1) its maximum
and the maxima of 256 groups of tokens; greedy rows end here. The k-th largest group maximum has at least k tokens at or above it and few more. (2) those are
noted with value and id, and ranked by comparing all pairs. A row without top-k and top-p adds up its weights in the order of the ids instead. Where the noted
tokens do not suffice (a flat nucleus, a large k), `_find` halves the range of logits, a pass a step, until few are left in it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.sampling_row import NONE, SEEN, forget, penalise, tile_of, wanted

Tensor = torch.Tensor

MOST = 1024  # candidates of a row
GROUPS = tl.constexpr(256)
SHIFT = tl.constexpr(50)  # a sum over candidates has weights below and counts above: 1023 * 2^40 < 2^50
RANK = tl.constexpr(1 << 50)
ONE = tl.constexpr(float(1 << 40))  # the weight of the likeliest token
FEW = tl.constexpr(512)  # candidates at which halving ends: comparing all pairs of more takes longer than another pass
HALVINGS = tl.constexpr(16)  # by value, which suits logits; then by bits, which ends
LOWEST = tl.constexpr(-(1 << 63))
HIGHEST = tl.constexpr((1 << 63) - 1)
NOTHING = tl.constexpr(-0x7F800001 << 32)  # -inf, packed
LAST_ID = tl.constexpr(0x7FFFFFFF)
INFINITE = tl.constexpr(0x7F800000)  # key of +inf
LOG2_E = tl.constexpr(1.4426950408889634)


# -- numbers


@triton.jit
def _key(x: tl.tensor) -> tl.tensor:
    """int32 in the order of x; -0 is 0, NaN is above all."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, LAST_ID, bits ^ ((bits >> 31) & LAST_ID))


@triton.jit
def _value(key: tl.tensor) -> tl.tensor:
    """The float32 of a key."""
    return (key ^ ((key >> 31) & LAST_ID)).to(tl.float32, bitcast=True)


@triton.jit
def _packed(x: tl.tensor, token: tl.tensor) -> tl.tensor:
    """int64 that falls in the canonical order: logit descending, then id ascending."""
    return (_key(x).to(tl.int64) << 32) | (token ^ LAST_ID).to(tl.int64)


@triton.jit
def _token(packed: tl.tensor) -> tl.tensor:
    """The id of a packed token, int64."""
    return (packed & 0xFFFFFFFF) ^ LAST_ID


@triton.jit
def _weight(x: tl.tensor, best: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """int64; `scale` is log2(e) / T."""
    return (tl.exp2((x - best) * scale) * ONE).to(tl.int64)


@triton.jit
def _uniform(seed: tl.tensor, counter: tl.tensor) -> tl.tensor:
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
def _share(share: tl.tensor, total: tl.tensor) -> tl.tensor:
    """floor(share * total) in whole weights."""
    return (share.to(tl.float64) * total.to(tl.float64)).to(tl.int64)


@triton.jit
def _fours(x: tl.tensor) -> tl.tensor:
    """[ROWS, 8]: what one thread holds of a line, added up, so that sums which are kept take few registers."""
    return tl.sum(tl.reshape(x, (x.shape[0], 8, 4)), 2)


@triton.jit
def _sum(x: tl.tensor) -> tl.tensor:
    return tl.sum(tl.sum(x, 1), 0)


# -- passes over a row (sampling_row.py), in tiles of ROWS x 32 tokens


@triton.jit
def _risen(most: tl.tensor, at: tl.tensor, x: tl.tensor, start: tl.tensor) -> tl.tensor:
    """The largest so far of each place of a tile, and where the first tile begins that has it."""
    return tl.maximum(most, x, propagate_nan=tl.PropagateNan.ALL), tl.where(x > most, start, at)


@triton.jit
def _best(row: tl.tuple, VOCAB: tl.constexpr, ROWS: tl.constexpr, AT_ONCE: tl.constexpr) -> tl.tensor:
    """The first of the canonical order, packed (of NaN where there is one), and the maxima of GROUPS groups. Loads of AT_ONCE tiles are on their way at once."""
    most = tl.full((ROWS, 32), NONE, tl.float32)
    at = tl.zeros((ROWS, 32), tl.int32)
    SIZE: tl.constexpr = ROWS * 32
    for start in tl.range(0, VOCAB // SIZE * SIZE, SIZE, loop_unroll_factor=AT_ONCE):
        x, _ = tile_of(row, start, VOCAB, ROWS, True)
        most, at = _risen(most, at, x, start)
    if VOCAB % SIZE:
        x, _ = tile_of(row, VOCAB // SIZE * SIZE, VOCAB, ROWS)
        most, at = _risen(most, at, x, VOCAB // SIZE * SIZE)
    at += tl.arange(0, ROWS)[:, None] * 32 + tl.arange(0, 32)[None, :]
    first = tl.max(tl.max(_packed(most, at), 1), 0)
    groups = tl.max(most, 1)
    if ROWS > GROUPS:
        groups = tl.max(tl.reshape(groups, (GROUPS, ROWS // GROUPS)), 1)
    return first, groups


@triton.jit
def _reached(groups: tl.tensor, count: tl.tensor) -> tl.tensor:
    """The count-th largest of the groups' maxima: at least so many tokens are not below it."""
    above = tl.sum((groups[None, :] >= groups[:, None]).to(tl.int32), 1)
    return tl.max(tl.where(above >= count, groups, NONE), 0)


@triton.jit
def _collect(
    row: tl.tuple, scratch_ptr: tl.tensor, low: tl.tensor, high: tl.tensor, best: tl.tensor, scale: tl.tensor,
    weigh: tl.tensor, VOCAB: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Note the tokens low <= x < high, in any order; their number, of which no more than MOST are noted, and with `weigh` the weight of the whole row."""
    tl.store(scratch_ptr, 0)
    tl.debug_barrier()
    total = tl.zeros((ROWS, 8), tl.int64)
    for start in range(0, VOCAB, ROWS * 32):
        x, token = tile_of(row, start, VOCAB, ROWS)
        inside = (x >= low) & (x < high) & (x > NONE)
        place = tl.atomic_add(scratch_ptr + tl.zeros((ROWS, 32), tl.int32), 1, mask=inside, sem="relaxed")
        tl.store(scratch_ptr + 1 + place, _packed(x, token), mask=inside & (place < MOST))
        if weigh:
            total += _fours(_weight(x, best, scale))
    tl.debug_barrier()
    return tl.load(scratch_ptr, volatile=True), _sum(total)


@triton.jit
def _order(scratch_ptr: tl.tensor, count: tl.tensor, best: tl.tensor, scale: tl.tensor, MOST: tl.constexpr, PAIRS: tl.constexpr) -> None:
    """For each noted token the sum over those before it, of weights and of ones above SHIFT."""
    lanes = tl.arange(0, PAIRS)
    for first in range(0, count, PAIRS):
        mine = tl.load(scratch_ptr + 1 + first + lanes, mask=first + lanes < count, other=LOWEST)
        total = tl.zeros((PAIRS, PAIRS), tl.int64)
        for second in range(0, count, PAIRS):
            other = tl.load(scratch_ptr + 1 + second + lanes, mask=second + lanes < count, other=NOTHING)
            one = tl.where(second + lanes < count, _weight(_value((other >> 32).to(tl.int32)), best, scale) + RANK, 0)
            total += tl.where(other[None, :] > mine[:, None], one[None, :], 0)
        tl.store(scratch_ptr + 1 + MOST + first + lanes, tl.sum(total, 1), mask=first + lanes < count)
    tl.debug_barrier()


@triton.jit
def _noted(scratch_ptr: tl.tensor, count: tl.tensor, best: tl.tensor, scale: tl.tensor, MOST: tl.constexpr) -> tl.tensor:
    """The noted tokens, packed, and their weights, 0 past the end."""
    lanes = tl.arange(0, MOST)
    packed = tl.load(scratch_ptr + 1 + lanes, mask=lanes < count, other=NOTHING)
    weight = tl.where(lanes < count, _weight(_value((packed >> 32).to(tl.int32)), best, scale), 0)
    return tl.where(lanes < count, packed, HIGHEST), weight


@triton.jit
def _before(scratch_ptr: tl.tensor, count: tl.tensor, MOST: tl.constexpr) -> tl.tensor:
    """Weight and number of what comes before each noted token."""
    lanes = tl.arange(0, MOST)
    both = tl.load(scratch_ptr + 1 + MOST + lanes, mask=lanes < count, other=HIGHEST)
    return both & (RANK - 1), both >> SHIFT


# -- in the order of the ids


@triton.jit
def _masses(
    row: tl.tuple, low: tl.tensor, high: tl.tensor, least: tl.tensor, best: tl.tensor, scale: tl.tensor,
    VOCAB: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The weight of each tile's tokens low <= x <= high, of `least` or more each."""
    masses = tl.zeros((TILES,), tl.int64)
    for start in range(0, VOCAB, ROWS * 32):
        x, _ = tile_of(row, start, VOCAB, ROWS)
        weight = _weight(x, best, scale)
        mass = _sum(tl.where((x >= low) & (x <= high) & (weight >= least), weight, 0))
        masses = tl.where(tl.arange(0, TILES) == start // (ROWS * 32), mass, masses)
    return masses


@triton.jit
def _last(masses: tl.tensor, goal: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """The last place with no more than `goal` before it, and what is before it."""
    before = tl.cumsum(masses, 0) - masses
    place = tl.max(tl.where(before <= goal, tl.arange(0, SIZE), 0), 0)
    return place, tl.sum(tl.where(tl.arange(0, SIZE) == place, before, 0), 0)


@triton.jit
def _walk(
    row: tl.tuple, masses: tl.tensor, goal: tl.tensor, low: tl.tensor, high: tl.tensor, least: tl.tensor,
    best: tl.tensor, scale: tl.tensor, VOCAB: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The last of the tokens of `_masses` with no more than `goal` before it."""
    tile, before = _last(masses, goal, TILES)
    x, _ = tile_of(row, tile * (ROWS * 32), VOCAB, ROWS)
    weight = _weight(x, best, scale)
    weight = tl.where((x >= low) & (x <= high) & (weight >= least), weight, 0)
    line, more = _last(tl.sum(weight, 1), goal - before, ROWS)
    chosen = tl.sum(tl.where((tl.arange(0, ROWS) == line)[:, None], weight, 0), 0)
    place, _ = _last(chosen, goal - before - more, 32)
    return (tile * ROWS + line) * 32 + place


# -- rows for which the noted tokens do not suffice


@triton.jit
def _extent(row: tl.tuple, from_packed: tl.tensor, least: tl.tensor, best: tl.tensor, scale: tl.tensor, VOCAB: tl.constexpr, ROWS: tl.constexpr) -> tl.tensor:
    """Number, weight and smallest logit of the allowed tokens down to `from_packed` of the canonical order, of weight `least` or more each."""
    count = tl.zeros((ROWS, 8), tl.int32)
    total = tl.zeros((ROWS, 8), tl.int64)
    lowest = tl.full((ROWS, 32), float("inf"), tl.float32)
    for start in range(0, VOCAB, ROWS * 32):
        x, token = tile_of(row, start, VOCAB, ROWS)
        weight = _weight(x, best, scale)
        inside = (x > NONE) & (_packed(x, token) >= from_packed) & (weight >= least)
        count += _fours(inside.to(tl.int32))
        total += _fours(tl.where(inside, weight, 0))
        lowest = tl.minimum(lowest, tl.where(inside, x, float("inf")))
    return _sum(count), _sum(total), tl.min(tl.min(lowest, 1), 0)


@triton.jit
def _above(row: tl.tuple, low: tl.tensor, best: tl.tensor, scale: tl.tensor, VOCAB: tl.constexpr, ROWS: tl.constexpr) -> tl.tensor:
    """Number and weight of the tokens x >= low."""
    count = tl.zeros((ROWS, 8), tl.int32)
    total = tl.zeros((ROWS, 8), tl.int64)
    for start in range(0, VOCAB, ROWS * 32):
        x, _ = tile_of(row, start, VOCAB, ROWS)
        count += _fours((x >= low).to(tl.int32))
        total += _fours(tl.where(x >= low, _weight(x, best, scale), 0))
    return _sum(count), _sum(total)


@triton.jit
def _middle(low: tl.tensor, high: tl.tensor, step: tl.tensor) -> tl.tensor:
    """A key between two that are not neighbours."""
    by_value = _key(0.5 * _value(low.to(tl.int32)) + 0.5 * _value(high.to(tl.int32))).to(tl.int64)
    usable = (step < HALVINGS) & (by_value > low) & (by_value < high)
    return tl.where(usable, by_value, low + (high - low) // 2)


@triton.jit
def _find(
    row: tl.tuple, scratch_ptr: tl.tensor, goal: tl.tensor, unit: tl.tensor, count: tl.tensor, lowest: tl.tensor,
    best: tl.tensor, scale: tl.tensor, VOCAB: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr, PAIRS: tl.constexpr, TILES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The last token of the canonical order, packed, with no more than `goal` of weight before it, or with `unit` of tokens. All `count` are >= lowest."""
    low, high = _key(lowest).to(tl.int64), _key(best).to(tl.int64) + 1
    below_n, above_n, above, step = count, count * 0, goal * 0, count * 0
    while (below_n - above_n > FEW) & (high - low > 1):  # the token is in [low, high); `above` and `above_n` are what is at or above high
        middle = _middle(low, high, step)
        n, weight = _above(row, _value(middle.to(tl.int32)), best, scale, VOCAB, ROWS)
        mass = tl.where(unit, n.to(tl.int64), weight)
        if mass > goal:
            low, below_n = middle, n
        else:
            high, above_n, above = middle, n, mass
        step += 1
    bottom = _value(low.to(tl.int32))
    if below_n - above_n <= MOST:
        n, _ = _collect(row, scratch_ptr, bottom, _value(high.to(tl.int32)), best, scale, False, VOCAB, ROWS, MOST)
        _order(scratch_ptr, n, best, scale, MOST, PAIRS)
        packed, _ = _noted(scratch_ptr, n, best, scale, MOST)
        before, rank = _before(scratch_ptr, n, MOST)
        found = tl.min(tl.where(tl.where(unit, rank, before) <= goal - above, packed, HIGHEST), 0)
    else:  # equal logits: by id
        each = tl.maximum(_weight(bottom, best, scale), 1)
        place = tl.where(unit, (goal - above) * each, goal - above)
        masses = _masses(row, bottom, bottom, 0, best, scale, VOCAB, ROWS, TILES)
        token = _walk(row, masses, place, bottom, bottom, 0, best, scale, VOCAB, ROWS, TILES)
        found = _packed(bottom, token)
    return found


@triton.jit
def _draw_far(
    row: tl.tuple, scratch_ptr: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, least: tl.tensor,
    uniform: tl.tensor, best: tl.tensor, scale: tl.tensor,
    VOCAB: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr, PAIRS: tl.constexpr, TILES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The k-th token; the last of the nucleus; the one that is drawn: each is found by its goal."""
    count, total, lowest = _extent(row, LOWEST, 0, best, scale, VOCAB, ROWS)
    goal = top_k - 1
    cut = goal * 0 + LOWEST
    found = cut
    for step in range(3):
        if ((step > 0) | (top_k < count)) & ((step != 1) | (top_p < 1)):
            unit = step == 0
            bottom = tl.where(unit, lowest, tl.maximum(lowest, best - 41.0 / scale))  # what is below weighs nothing
            found = _find(row, scratch_ptr, goal, unit, count, bottom, best, scale, VOCAB, ROWS, MOST, PAIRS, TILES)
            cut = tl.maximum(cut, found)
        if step < 2:
            _, mass, _ = _extent(row, cut, tl.where(step == 0, 0, least), best, scale, VOCAB, ROWS)
            goal = tl.where(step == 0, _share(top_p, mass), tl.minimum(_share(uniform, mass), mass - 1))
    return _token(found)


# -- a row


@triton.jit
def _draw_front(
    row: tl.tuple, scratch_ptr: tl.tensor, groups: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, by_k: tl.tensor,
    least: tl.tensor, uniform: tl.tensor, best: tl.tensor, scale: tl.tensor,
    VOCAB: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr, PAIRS: tl.constexpr, TILES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Among the likeliest: top-k, top-p, min-p, as far as they are wanted."""
    low = _reached(groups, tl.where(by_k, tl.minimum(top_k, GROUPS), GROUPS * 3 // 4))
    count, total = _collect(row, scratch_ptr, low, float("inf"), best, scale, by_k == 0, VOCAB, ROWS, MOST)
    packed, weight = _noted(scratch_ptr, tl.minimum(count, MOST), best, scale, MOST)
    enough = tl.where(by_k, count >= top_k, tl.sum(weight, 0) > _share(top_p, total)) | (low == NONE)
    if (count <= MOST) & enough:
        _order(scratch_ptr, count, best, scale, MOST, PAIRS)
        before, rank = _before(scratch_ptr, count, MOST)
        total = tl.where(by_k, tl.sum(tl.where(rank < top_k, weight, 0), 0), total)
        kept = (rank < top_k) & (before <= _share(top_p, total)) & (weight >= least)
        mass = tl.sum(tl.where(kept, weight, 0), 0)
        goal = tl.minimum(_share(uniform, mass), mass - 1)
        token = _token(tl.min(tl.where(kept & (before <= goal), packed, HIGHEST), 0))
    else:
        token = _draw_far(row, scratch_ptr, top_k, top_p, least, uniform, best, scale, VOCAB, ROWS, MOST, PAIRS, TILES)
    return token


@triton.jit
def _draw(
    row: tl.tuple, scratch_ptr: tl.tensor, groups: tl.tensor, values_ptr: tl.tensor, uniform: tl.tensor,
    best: tl.tensor, VOCAB: tl.constexpr, ROWS: tl.constexpr, MOST: tl.constexpr, PAIRS: tl.constexpr, TILES: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The token of a row that is not greedy."""
    scale = tl.minimum(1.0 / tl.load(values_ptr) * LOG2_E, 1e30)
    top_p = tl.load(values_ptr + 1)
    least = tl.ceil(tl.load(values_ptr + 2) * ONE).to(tl.int64)  # min-p: the likeliest weighs ONE
    top_k = tl.load(values_ptr + 6).to(tl.int64)
    by_k = (top_k > 0) & (top_k < VOCAB)
    if by_k | (top_p < 1):
        top_k = tl.where(by_k, top_k, VOCAB)
        token = _draw_front(row, scratch_ptr, groups, top_k, top_p, by_k, least, uniform, best, scale, VOCAB, ROWS, MOST, PAIRS, TILES)
    else:
        masses = _masses(row, NONE, best, least, best, scale, VOCAB, ROWS, TILES)
        mass = tl.sum(masses, 0)
        goal = tl.minimum(_share(uniform, mass), mass - 1)
        token = _walk(row, masses, goal, NONE, best, least, best, scale, VOCAB, ROWS, TILES).to(tl.int64)
    return token


#: where these lie depends on the step and on the number of slots; a kernel for each alignment would be compiled while requests wait
POINTERS = "slots lengths values seeds prompt_len young_until words mask_rows young_words table tokens positions ends where"
ANYWHERE = [f"{name}_ptr" for name in POINTERS.split()]


@triton.jit(do_not_specialize=["words_stride", "table_stride", "nobody", "line", "lines_end"], do_not_specialize_on_alignment=ANYWHERE)
def _choose_kernel(
    logits_ptr: tl.tensor, slots_ptr: tl.tensor, lengths_ptr: tl.tensor, values_ptr: tl.tensor, seeds_ptr: tl.tensor, prompt_len_ptr: tl.tensor,
    young_until_ptr: tl.tensor, words_ptr: tl.tensor, mask_rows_ptr: tl.tensor, young_words_ptr: tl.tensor, table_ptr: tl.tensor, tokens_ptr: tl.tensor,
    scratch_ptr: tl.tensor, edits_ptr: tl.tensor, positions_ptr: tl.tensor, ends_ptr: tl.tensor, where_ptr: tl.tensor,
    logits_stride: tl.tensor, words_stride: tl.tensor, table_stride: tl.tensor, nobody: tl.tensor, line: tl.tensor, lines_end: tl.tensor,
    VOCAB: tl.constexpr, ROWS: tl.constexpr, MASKS: tl.constexpr, MOST: tl.constexpr, PAIRS: tl.constexpr, TILES: tl.constexpr, GOES_ON: tl.constexpr,
) -> None:  # fmt: skip
    at = tl.program_id(0).to(tl.int64)
    slot, length = tl.load(slots_ptr + at), tl.load(lengths_ptr + at)
    prompt_len = tl.load(prompt_len_ptr + slot)
    generated = length - prompt_len
    logits_ptr += at * logits_stride
    masked, mask_ptr, waits = at < 0, None, at < 0
    if MASKS:
        place, young_until = tl.load(mask_rows_ptr + at), tl.load(young_until_ptr + slot)
        masked, waits = place >= 0, (place < -1) | ((place < 0) & (young_until < 0))
        mask_ptr = words_ptr + tl.maximum(place, 0) * words_stride
        if (place < 0) & (generated < young_until):
            masked = place < 0
            mask_ptr = young_words_ptr + slot * words_stride
    row = (logits_ptr, mask_ptr, masked, None, None)
    line_ptr, known_ptr = edits_ptr + slot * VOCAB, table_ptr + slot * table_stride
    values_ptr += slot * 7
    penalised, begin = wanted(values_ptr, prompt_len)
    edited = (logits_ptr, mask_ptr, masked, line_ptr, penalised)
    token = at * 0 - 1
    if waits == 0:
        if penalised > 0:
            penalise(logits_ptr, line_ptr, known_ptr, values_ptr, begin, prompt_len, length)
            first, groups = _best(edited, VOCAB, ROWS, 2)
        else:  # as if there were no penalties: most steps are greedy, or nearly
            first, groups = _best(row, VOCAB, ROWS, 4)
        key = (first >> 32).to(tl.int32)
        best = _value(key)
        if (key < INFINITE) & (best != NONE):
            token = _token(first)
            if (tl.load(values_ptr) > 0) & (tl.load(values_ptr + 6) != 1):
                uniform = _uniform(tl.load(seeds_ptr + slot), generated)
                token = _draw(edited, scratch_ptr + slot * (2 * MOST + 1), groups, values_ptr, uniform, best, VOCAB, ROWS, MOST, PAIRS, TILES)
        if penalised > 0:
            forget(line_ptr, known_ptr, begin, length)
    where = tl.load(where_ptr + at)
    tl.store(tokens_ptr + where, token, mask=where >= 0)
    tl.store(table_ptr + slot * table_stride + length, tl.maximum(token, 0).to(tl.int32))
    if GOES_ON:
        more = (slot != nobody).to(tl.int64)
        tl.store(lengths_ptr + at, length + more)
        tl.store(positions_ptr + at, tl.load(positions_ptr + at) + more)
        tl.store(ends_ptr + at, tl.load(ends_ptr + at) + more)
        tl.store(where_ptr + at, tl.where(where < 0, where, (where + line) % lines_end))


def scratch_width() -> int:
    """int64 numbers of work space a slot."""
    return 2 * MOST + 1


def choose_tokens(
    logits: Tensor, slots: Tensor, lengths: Tensor, table: tuple[Tensor, Tensor, Tensor, Tensor], masks: tuple[Tensor, Tensor, Tensor] | None, known: Tensor,
    tokens: Tensor, where: Tensor, scratch: Tensor, edits: Tensor, goes_on: tuple[Tensor, Tensor] | None = None,
    *, lines: int = 256, num_warps: int = 16, pairs: int = 64,
) -> None:  # fmt: skip
    """The next token of each row of logits [S, V] of any floating type; -1 where none can be chosen. It goes to tokens int64 [N] or [lines, N], seen as one
    line, at where int64 [S] of the row; nowhere if that is -1. `tokens` may be the host's: pinned.

    slots, lengths int64 [S]: the row's slot, and how many of its tokens are known. `table`: of all slots the float32 parameters [slots, 7], the seeds, the
    lengths of the prompts, and the number of tokens up to which an answer is young, int64 [slots]. `masks`: int32 words [G, W], bit t % 32 of word t // 32 says
    that token t may come; for each row the place of its words, int32 [S], -1 for none; and the words [slots, W] of young answers without such. Young up to -1
    tokens is an answer with a grammar: without its words nothing is chosen, at once, for another launch will choose when they are there. The same with a place
    of -2, whatever the answer. The token, or 0, is also written to known int32 [slots, L] at [slot, length]. scratch int64 [slots, scratch_width()]: slots of
    rows that are not greedy differ. edits int32 [slots, V], zero before and after: rows whose slots have penalties are chosen from with them, where their tokens
    are known[slot, :length]; these slots differ, too.
    `goes_on`: positions and ends, int64 [S], for the next step: they become one larger, and so do lengths, where the slot is not the last, which is nobody's. And
    `where` becomes the same place of the next line, behind the last one of the first.
    """
    rows, vocab = logits.shape
    values, seeds, prompt_len, young_until = table
    assert logits.is_floating_point() and logits.stride(1) == 1 and scratch.is_contiguous() and scratch.shape[1] == scratch_width()
    assert tokens.is_contiguous() and where.dtype == tokens.dtype == torch.int64
    assert values.is_contiguous() and known.dtype == torch.int32 and known.stride(1) == 1
    words, places, young_words = masks if masks is not None else (slots, slots, slots)
    assert masks is None or words.stride() == young_words.stride()
    assert edits.is_contiguous() and edits.dtype == torch.int32 and edits.shape[1] == vocab and known.shape[1] <= SEEN.value
    if rows == 0:
        return
    positions, ends = goes_on or (lengths, lengths)
    tiles = int(triton.next_power_of_2(triton.cdiv(vocab, lines * 32)))
    _choose_kernel[(rows,)](
        logits, slots, lengths, values, seeds, prompt_len, young_until, words, places, young_words, known, tokens, scratch, edits, positions, ends, where,
        logits.stride(0), words.stride(0), known.stride(0), known.shape[0] - 1, tokens.shape[-1], tokens.numel(),
        VOCAB=vocab, ROWS=lines, MASKS=masks is not None, MOST=MOST, PAIRS=pairs, TILES=tiles, GOES_ON=goes_on is not None, num_warps=num_warps,
        enable_fp_fusion=False,  # penalties are rounded operation by operation, as torch's are
    )  # fmt: skip
