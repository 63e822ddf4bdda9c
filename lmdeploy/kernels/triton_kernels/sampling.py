"""`choose_tokens`: the next token of every row in one launch, a program a row, without a sort and without a look from the host; part of a CUDA graph.

What is chosen is what `engine/sampler.py` defines. Weights are whole numbers, floor(2^40 e^((x - max) / T)): their sums are exact and do not depend on
the order of adding, so a row's token depends on nothing but the row. A first pass finds the row's maximum (greedy rows end here), those of its lines of 32
tokens and those of 256 groups of lines. The k-th largest of the groups' has at least k tokens at or above it and few more: they are in few lines, which are
read again, and ranked by comparing all pairs. Top-p alone takes a pass for the total, too. A row without either adds up its weights in the order of the ids.
Where the noted tokens do not suffice (a flat nucleus, a large k), `_find` halves the range of logits, a pass a step, until few are left in it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lmdeploy.kernels.triton_kernels.sampling_rows import (
    GROUPS,
    HIGHEST,
    MOST,
    NONE,
    ONE,
    collect,
    collect_front,
    count_above,
    find_best,
    key_of,
    load_before,
    load_line_weights,
    load_noted,
    pack,
    rank_pairs,
    reach,
    share_of,
    token_of,
    uniform_of,
    value_of,
    walk,
    weigh,
    weigh_lines,
)  # fmt: skip

Tensor = torch.Tensor

FEW = tl.constexpr(512)  # candidates at which halving ends: comparing all pairs of more takes longer than another pass
HALVINGS = tl.constexpr(16)  # by value, which suits logits; then by bits, which ends
INFINITE = tl.constexpr(0x7F800000)  # key of +inf
LOG2_E = tl.constexpr(1.4426950408889634)


# -- rows for which the noted tokens do not suffice


@triton.jit
def _middle(low: tl.tensor, high: tl.tensor, step: tl.tensor) -> tl.tensor:
    """A key between two that are not neighbours."""
    by_value = key_of(0.5 * value_of(low.to(tl.int32)) + 0.5 * value_of(high.to(tl.int32))).to(tl.int64)
    usable = (step < HALVINGS) & (by_value > low) & (by_value < high)
    return tl.where(usable, by_value, low + (high - low) // 2)


@triton.jit
def _find(
    row_ptr: tl.tensor, words_ptr: tl.tensor, masked: tl.tensor, scratch_ptr: tl.tensor, goal: tl.tensor, unit: tl.tensor, count: tl.tensor, lowest: tl.tensor,
    best: tl.tensor, scale: tl.tensor, VOCAB: tl.constexpr, ROWS: tl.constexpr, MASKS: tl.constexpr, PAIRS: tl.constexpr, FOLD: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The last token of the canonical order, packed, with no more than `goal` of weight before it, or with `unit` of tokens, and the weight down to it.

    It is one of the `count` tokens x >= lowest.
    """
    low, high = key_of(lowest).to(tl.int64), key_of(best).to(tl.int64) + 1
    below_n, above_n, above, step = count, count * 0, goal * 0, count * 0
    while (below_n - above_n > FEW) & (high - low > 1):  # the token is in [low, high); `above` and `above_n` are what is at or above high
        middle = _middle(low, high, step)
        n, mass = count_above(row_ptr, words_ptr, masked, value_of(middle.to(tl.int32)), best, scale, VOCAB, ROWS, MASKS)
        if tl.where(unit, n.to(tl.int64), mass) > goal:
            low, below_n = middle, n
        else:
            high, above_n, above = middle, n, mass
        step += 1
    bottom = value_of(low.to(tl.int32))
    if below_n - above_n <= FEW:
        n = collect(row_ptr, words_ptr, masked, scratch_ptr, bottom, value_of(high.to(tl.int32)), VOCAB, ROWS, MASKS)
        rank_pairs(scratch_ptr, n, best, scale, PAIRS)
        packed, weight = load_noted(scratch_ptr, n, best, scale)
        before, rank = load_before(scratch_ptr, n)
        fits = tl.where(unit, above_n + rank, above + before) <= goal
        found = tl.min(tl.where(fits, packed, HIGHEST), 0)
        down = above + tl.sum(tl.where(fits, weight, 0), 0)
    else:  # equal logits: by id
        each = weigh(bottom, best, scale)
        place = tl.where(unit, goal - above_n, (goal - above) // tl.maximum(each, 1))
        weigh_lines(row_ptr, words_ptr, masked, scratch_ptr, bottom, 0, best, bottom, scale, VOCAB, ROWS, MASKS)
        lines = load_line_weights(scratch_ptr, VOCAB, FOLD)
        token = walk(row_ptr, words_ptr, masked, lines, place * each, bottom, 0, best, bottom, scale, VOCAB, MASKS, FOLD)
        found = pack(bottom, token)
        down = above + (place + 1) * each
    return found, down


@triton.jit
def _draw_far(
    row_ptr: tl.tensor, words_ptr: tl.tensor, masked: tl.tensor, scratch_ptr: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, least: tl.tensor,
    uniform: tl.tensor, best: tl.tensor, scale: tl.tensor,
    VOCAB: tl.constexpr, ROWS: tl.constexpr, MASKS: tl.constexpr, PAIRS: tl.constexpr, FOLD: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The k-th token; the last of the nucleus; the one that is drawn: each is found by its goal."""
    lowest = best - 41.0 / scale  # what is below weighs nothing
    count, mass = count_above(row_ptr, words_ptr, masked, lowest, best, scale, VOCAB, ROWS, MASKS)
    goal = top_k - 1
    found = goal
    for step in range(3):
        if ((step > 0) | (top_k < count)) & ((step != 1) | (top_p < 1)):
            found, down = _find(
                row_ptr, words_ptr, masked, scratch_ptr, goal, step == 0, count, lowest, best, scale, VOCAB, ROWS, MASKS, PAIRS, FOLD
            )  # fmt: skip
            mass = tl.minimum(mass, down)
        if (step == 1) & (least > 0):
            weigh_lines(row_ptr, words_ptr, masked, scratch_ptr, NONE, least, best, best, scale, VOCAB, ROWS, MASKS)
            mass = tl.minimum(mass, tl.sum(load_line_weights(scratch_ptr, VOCAB, FOLD), 0))
        goal = tl.where(step == 0, share_of(top_p, mass), tl.minimum(share_of(uniform, mass), mass - 1))
    return token_of(found)


# -- a row


@triton.jit
def _draw_front(
    row_ptr: tl.tensor, words_ptr: tl.tensor, masked: tl.tensor, scratch_ptr: tl.tensor, groups: tl.tensor, top_k: tl.tensor, top_p: tl.tensor, by_k: tl.tensor,
    least: tl.tensor, uniform: tl.tensor, best: tl.tensor, scale: tl.tensor,
    VOCAB: tl.constexpr, ROWS: tl.constexpr, MASKS: tl.constexpr, PAIRS: tl.constexpr, FOLD: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Among the likeliest: top-k, top-p, min-p, as far as they are wanted."""
    low = reach(groups, tl.where(by_k, tl.minimum(top_k, GROUPS), GROUPS * 3 // 4))
    count = collect_front(row_ptr, words_ptr, masked, scratch_ptr, low, VOCAB, MASKS, FOLD)
    total = top_k
    if by_k == 0:
        _, total = count_above(row_ptr, words_ptr, masked, NONE, best, scale, VOCAB, ROWS, MASKS)
    packed, weight = load_noted(scratch_ptr, tl.minimum(count, MOST), best, scale)
    enough = tl.where(by_k, count >= top_k, tl.sum(weight, 0) > share_of(top_p, total)) | (low == NONE)
    if (count <= MOST) & enough:
        rank_pairs(scratch_ptr, count, best, scale, PAIRS)
        before, rank = load_before(scratch_ptr, count)
        total = tl.where(by_k, tl.sum(tl.where(rank < top_k, weight, 0), 0), total)
        kept = (rank < top_k) & (before <= share_of(top_p, total)) & (weight >= least)
        mass = tl.sum(tl.where(kept, weight, 0), 0)
        goal = tl.minimum(share_of(uniform, mass), mass - 1)
        token = token_of(tl.min(tl.where(kept & (before <= goal), packed, HIGHEST), 0))
    else:
        token = _draw_far(
            row_ptr, words_ptr, masked, scratch_ptr, top_k, top_p, least, uniform, best, scale, VOCAB, ROWS, MASKS, PAIRS, FOLD
        )  # fmt: skip
    return token


@triton.jit
def _draw(
    row_ptr: tl.tensor, words_ptr: tl.tensor, masked: tl.tensor, scratch_ptr: tl.tensor, groups: tl.tensor, values_ptr: tl.tensor, uniform: tl.tensor,
    best: tl.tensor, VOCAB: tl.constexpr, ROWS: tl.constexpr, MASKS: tl.constexpr, PAIRS: tl.constexpr, FOLD: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The token of a row that is not greedy."""
    scale = tl.minimum(1.0 / tl.load(values_ptr) * LOG2_E, 1e30)
    top_p = tl.load(values_ptr + 1)
    least = tl.ceil(tl.load(values_ptr + 2) * ONE).to(tl.int64)  # min-p: the likeliest weighs ONE
    top_k = tl.load(values_ptr + 6).to(tl.int64)
    by_k = (top_k > 0) & (top_k < VOCAB)
    if by_k | (top_p < 1):
        top_k = tl.where(by_k, top_k, VOCAB)
        token = _draw_front(
            row_ptr, words_ptr, masked, scratch_ptr, groups, top_k, top_p, by_k, least, uniform, best, scale, VOCAB, ROWS, MASKS, PAIRS, FOLD
        )  # fmt: skip
    else:
        weigh_lines(row_ptr, words_ptr, masked, scratch_ptr, NONE, least, best, best, scale, VOCAB, ROWS, MASKS)
        lines = load_line_weights(scratch_ptr, VOCAB, FOLD)
        mass = tl.sum(lines, 0)
        goal = tl.minimum(share_of(uniform, mass), mass - 1)
        token = walk(row_ptr, words_ptr, masked, lines, goal, NONE, least, best, best, scale, VOCAB, MASKS, FOLD).to(tl.int64)
    return token


@triton.jit(
    do_not_specialize=["words_stride", "table_stride"],
    do_not_specialize_on_alignment=[
        "slots_ptr",
        "lengths_ptr",
        "values_ptr",
        "seeds_ptr",
        "prompt_len_ptr",
        "words_ptr",
        "mask_rows_ptr",
        "table_ptr",
        "tokens_ptr",
    ],
)
def _choose_kernel(
    logits_ptr: tl.tensor, slots_ptr: tl.tensor, lengths_ptr: tl.tensor, values_ptr: tl.tensor, seeds_ptr: tl.tensor, prompt_len_ptr: tl.tensor,
    words_ptr: tl.tensor, mask_rows_ptr: tl.tensor, table_ptr: tl.tensor, tokens_ptr: tl.tensor, scratch_ptr: tl.tensor,
    logits_stride: tl.tensor, words_stride: tl.tensor, table_stride: tl.tensor,
    VOCAB: tl.constexpr, ROWS: tl.constexpr, MASKS: tl.constexpr, PAIRS: tl.constexpr, FOLD: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot, length = tl.load(slots_ptr + row), tl.load(lengths_ptr + row)
    row_ptr = logits_ptr + row * logits_stride
    scratch_ptr += slot * (2 * MOST + (VOCAB + 31) // 32)
    values_ptr += slot * 7
    drawn = (tl.load(values_ptr) > 0) & (tl.load(values_ptr + 6) != 1)
    masked = row < 0
    if MASKS:
        place = tl.load(mask_rows_ptr + row)
        masked = place >= 0
        words_ptr += tl.maximum(place, 0) * words_stride
    first, groups = find_best(row_ptr, words_ptr, masked, scratch_ptr, drawn, VOCAB, ROWS, MASKS)
    key = (first >> 32).to(tl.int32)
    best = value_of(key)
    token = token_of(first)
    if (key >= INFINITE) | (best == NONE):
        token = token * 0 - 1
    elif drawn:
        uniform = uniform_of(tl.load(seeds_ptr + slot), length - tl.load(prompt_len_ptr + slot))
        token = _draw(row_ptr, words_ptr, masked, scratch_ptr, groups, values_ptr, uniform, best, VOCAB, ROWS, MASKS, PAIRS, FOLD)
    tl.store(tokens_ptr + row, token)
    tl.store(table_ptr + slot * table_stride + length, tl.maximum(token, 0).to(tl.int32))


def scratch_width(vocab: int) -> int:
    """int64 numbers of work space a slot."""
    return 2 * int(MOST.value) + int(triton.cdiv(vocab, 32))


def choose_tokens(
    logits: Tensor, slots: Tensor, lengths: Tensor, table: tuple[Tensor, Tensor, Tensor], masks: tuple[Tensor, Tensor] | None, known: Tensor,
    tokens: Tensor, scratch: Tensor, *, rows: int = 256, num_warps: int = 16, pairs: int = 64,
) -> None:  # fmt: skip
    """tokens int64 [S] = the next token of each row of logits [S, V] of any floating type; -1 where none can be chosen.

    slots, lengths int64 [S]: the row's slot, and how many of its tokens are known. `table`: of all slots the float32 parameters [slots, 7], the seeds and the
    lengths of the prompts, int64 [slots]. `masks`: int32 words [G, W], bit t % 32 of word t // 32 says that token t may come, and for each row the place of its
    words, int32 [S], -1 for none. The token, or 0, is also written to known int32 [slots, L] at [slot, length]. scratch int64
    [slots, scratch_width(V)]: slots of rows that are not greedy differ.
    """
    count, vocab = logits.shape
    assert logits.is_floating_point() and logits.stride(1) == 1 and scratch.is_contiguous() and scratch.shape[1] == scratch_width(vocab)
    assert table[0].is_contiguous() and known.dtype == torch.int32 and known.stride(1) == 1
    words, places = masks if masks is not None else (known, known)
    if count == 0:
        return
    fold = int(triton.next_power_of_2(triton.cdiv(vocab, 32 * 32)))
    _choose_kernel[(count,)](
        logits, slots, lengths, *table, words, places, known, tokens, scratch, logits.stride(0), words.stride(0), known.stride(0),
        VOCAB=vocab, ROWS=rows, MASKS=masks is not None, PAIRS=pairs, FOLD=fold, num_warps=num_warps,
    )  # fmt: skip
