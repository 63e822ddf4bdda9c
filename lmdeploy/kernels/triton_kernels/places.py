"""What a step reads from the slot tables, in one launch instead of a dozen: its tokens, where their keys go, the block table and lengths of its sequences,
what their rope depends on."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor
BLOCK = 128  # tokens, or blocks of a sequence, at a time


#: parts of one array: where each begins depends on the lengths of those before
ANYWHERE = ["positions_ptr", "token_slots_ptr", "slots_ptr", "ends_ptr", "starts_ptr"]


@triton.jit(do_not_specialize=["num_tokens", "num_sequences", "context", "max_blocks", "width"], do_not_specialize_on_alignment=ANYWHERE)
def _places_kernel(
    positions_ptr: tl.tensor, token_slots_ptr: tl.tensor, slots_ptr: tl.tensor, ends_ptr: tl.tensor, starts_ptr: tl.tensor,
    tokens_ptr: tl.tensor, blocks_ptr: tl.tensor, rope_lengths_ptr: tl.tensor, ids_ptr: tl.tensor, mapping_ptr: tl.tensor, lens_ptr: tl.tensor,
    query_start_ptr: tl.tensor, table_ptr: tl.tensor, ropes_ptr: tl.tensor, num_tokens: tl.tensor, num_sequences: tl.tensor, context: tl.tensor,
    max_blocks: tl.tensor, width: tl.tensor,
    ROPES: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """The first programs take a sequence each, the others BLOCK tokens."""
    program, place = tl.program_id(0), tl.arange(0, BLOCK)
    if program < num_sequences:
        row_ptr = blocks_ptr + tl.load(slots_ptr + program) * max_blocks
        tl.store(lens_ptr + program, tl.load(ends_ptr + program).to(tl.int32))
        tl.store(query_start_ptr + program, tl.load(starts_ptr + program).to(tl.int32))
        if program == num_sequences - 1:
            tl.store(query_start_ptr + num_sequences, tl.load(starts_ptr + num_sequences).to(tl.int32))
        for first in range(0, context, BLOCK):
            wanted = first + place < context
            tl.store(table_ptr + program.to(tl.int64) * context + first + place, tl.load(row_ptr + first + place, mask=wanted), mask=wanted)
    else:
        token = (program - num_sequences) * BLOCK + place
        inside = token < num_tokens
        position, slot = tl.load(positions_ptr + token, mask=inside, other=0), tl.load(token_slots_ptr + token, mask=inside, other=0)
        block = tl.load(blocks_ptr + slot * max_blocks + position // SIZE, mask=inside, other=0).to(tl.int64)
        tl.store(mapping_ptr + token, block * SIZE + position % SIZE, mask=inside)
        if ROPES:
            tl.store(ropes_ptr + token, tl.load(rope_lengths_ptr + slot, mask=inside, other=0), mask=inside)
        tl.store(ids_ptr + token, tl.load(tokens_ptr + slot * width + position, mask=inside, other=0).to(tl.int64), mask=inside)


def find_places(
    positions: Tensor, token_slots: Tensor, slots: Tensor, ends: Tensor, query_start: Tensor, tokens: Tensor, blocks: Tensor, rope_lengths: Tensor | None,
    block_size: int, context: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """(token ids int64 [T], slot mapping int64 [T], kv lens int32 [B], query start int32 [B + 1], block table int32 [B, C], rope lengths int64 [T] | None) of a step.

    positions, token_slots int64 [T]; slots, ends int64 [B]; query_start int64 [B + 1]; of all slots the tokens int32 [S, W] and blocks int32 [S, M], of
    which the first C = `context` are wanted, and rope lengths int64 [S], where those are wanted. B is at least 1.
    """
    (num_tokens,), (num_sequences,), device = positions.shape, slots.shape, positions.device
    ids, mapping = (torch.empty(num_tokens, dtype=torch.int64, device=device) for _ in range(2))
    lens, starts = (torch.empty(size, dtype=torch.int32, device=device) for size in (num_sequences, num_sequences + 1))
    table = torch.empty((num_sequences, context), dtype=torch.int32, device=device)
    ropes = None if rope_lengths is None else torch.empty_like(ids)
    _places_kernel[(num_sequences + triton.cdiv(num_tokens, BLOCK),)](
        positions, token_slots, slots, ends, query_start, tokens, blocks, tokens if rope_lengths is None else rope_lengths, ids, mapping, lens, starts, table,
        ids if ropes is None else ropes,
        num_tokens, num_sequences, context, blocks.stride(0), tokens.stride(0), ROPES=ropes is not None, SIZE=block_size, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return ids, mapping, lens, starts, table, ropes
