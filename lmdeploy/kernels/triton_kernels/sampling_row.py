"""A row of logits as the kernel that chooses tokens reads it (sampling.py), in tiles: a mask forbids tokens, penalties move those that are known.

To its functions a row is (logits, words, masked, edits, penalised): where its logits, the words of its mask and its line of `edits` begin, and whether they
count. Without any masks `words` is None, without penalties `edits`.

A line of `edits` is zero but while the row's program runs. `penalise` first counts there how often each known token was generated, and notes which came with
the prompt. Then each of them gets, in the count's place, its logit with penalties, as float32, which every pass reads: the work of penalties goes with the
length of an answer, once, and not with the vocabulary and the passes. A token that is known twice is worked out twice, to the same value. `forget` makes the
line zero again.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE = tl.constexpr(float("-inf"))
SEEN = tl.constexpr(1 << 22)  # with the prompt; below it is the count
LEAST_VALUE = tl.constexpr(1 << 23)  # bits of the smallest float32 above 0 that is normal: from there on, and below 0, a word is a value and no count
MINUS_ZERO = tl.constexpr(-(1 << 31))  # as int32
KNOWN = tl.constexpr(2048)  # tokens looked at in one go


@triton.jit
def tile_of(row: tl.tuple, start: tl.tensor, VOCAB: tl.constexpr, ROWS: tl.constexpr, WHOLE: tl.constexpr = False) -> tl.tensor:
    """Logits and ids of ROWS x 32 tokens from `start` on, one word of a mask a line; -inf where nothing is or nothing may come. WHOLE: all of it is inside."""
    logits_ptr, words_ptr, masked, edits_ptr, penalised = row
    line, place = tl.arange(0, ROWS)[:, None] * 32, tl.arange(0, 32)[None, :]
    token = start + line + place
    if WHOLE:
        x = tl.load(logits_ptr + token).to(tl.float32)
    else:
        x = tl.load(logits_ptr + token, mask=token < VOCAB, other=NONE).to(tl.float32)
    if edits_ptr is not None:  # from L2, where atomics put it; a row without penalties loads nothing
        there = tl.zeros_like(token) + penalised > 0
        if not WHOLE:
            there &= token < VOCAB
        edited = tl.load(edits_ptr + token, mask=there, other=0, cache_modifier=".cg")
        x = tl.where(edited != 0, edited.to(tl.float32, bitcast=True), x)
    if words_ptr is not None:  # noqa: SIM102 - a constant of the compiler, then a number on the device
        if masked:
            word = tl.load(words_ptr + (start + line) // 32, mask=start + line < VOCAB, other=0)
            x = tl.where(((word >> place) & 1) != 0, x, NONE)
    return x, token


@triton.jit
def _penalised(x: tl.tensor, count: tl.tensor, repetition: tl.tensor, presence: tl.tensor, frequency: tl.tensor) -> tl.tensor:
    """In the sampler's order of operations, each rounded (`Sampler._penalise`): no product may be fused with a sum. int32, never 0 and never like a count."""
    x = tl.where(x < 0, x * repetition, tl.div_rn(x, repetition + tl.zeros_like(x)))
    times = (count & (SEEN - 1)).to(tl.float32)
    x -= times * frequency + tl.where(times > 0, presence, 0.0)
    bits = x.to(tl.int32, bitcast=True)
    return tl.where((bits & 0x7FFFFFFF) < LEAST_VALUE, MINUS_ZERO, bits)


@triton.jit
def wanted(values_ptr: tl.tensor, prompt_len: tl.tensor) -> tl.tensor:
    """Whether a slot's parameters have penalties, 1 or 0, and from where on its tokens count: presence and frequency are of the answer only."""
    repetition = tl.load(values_ptr + 3) != 1
    some = repetition | (tl.load(values_ptr + 4) != 0) | (tl.load(values_ptr + 5) != 0)
    return some.to(tl.int32), tl.where(repetition, 0, prompt_len)


@triton.jit
def penalise(
    logits_ptr: tl.tensor, edits_ptr: tl.tensor, known_ptr: tl.tensor, values_ptr: tl.tensor, first: tl.tensor, prompt_len: tl.tensor, length: tl.tensor
) -> None:
    """Have the line of edits hold what the known tokens from `first` on have instead of their logits."""
    for start in range(first, length, KNOWN):
        place = start + tl.arange(0, KNOWN)
        token = tl.load(known_ptr + place, mask=place < length, other=0)
        tl.atomic_or(edits_ptr + token, SEEN, mask=(place < prompt_len) & (place < length), sem="relaxed")
        tl.atomic_add(edits_ptr + token, 1, mask=(place >= prompt_len) & (place < length), sem="relaxed")
    tl.debug_barrier()
    repetition, presence, frequency = tl.load(values_ptr + 3), tl.load(values_ptr + 4), tl.load(values_ptr + 5)
    for start in range(first, length, KNOWN):
        place = start + tl.arange(0, KNOWN)
        token = tl.load(known_ptr + place, mask=place < length, other=0)
        count = tl.load(edits_ptr + token, mask=place < length, other=0, volatile=True)  # or a value already, where the token is known twice
        x = tl.load(logits_ptr + token, mask=place < length, other=0).to(tl.float32)
        value = _penalised(x, count, repetition, presence, frequency)
        tl.atomic_xchg(edits_ptr + token, value, mask=(count > 0) & (count < LEAST_VALUE), sem="relaxed")
    tl.debug_barrier()


@triton.jit
def forget(edits_ptr: tl.tensor, known_ptr: tl.tensor, first: tl.tensor, length: tl.tensor) -> None:
    """Behind the last pass: the line of edits is zero again."""
    tl.debug_barrier()
    for start in range(first, length, KNOWN):
        place = start + tl.arange(0, KNOWN)
        token = tl.load(known_ptr + place, mask=place < length, other=0)
        tl.atomic_xchg(edits_ptr + token, 0, mask=place < length, sem="relaxed")
