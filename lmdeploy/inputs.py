"""What one forward pass works on: `ForwardInputs`, handed down to every layer; and `Scratch`, the step's buffers.

Nothing here is global: the cache, the positions and the buffers are arguments. All tensors live on the model's device.
Sequences are ordered so that those with exactly one new token come first (`num_decode` of them): an attention kernel may
treat the leading `num_decode` rows as decode and the rest as (chunked) prefill. Nothing above `engine/batch.py` knows the word.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from lmdeploy.kv_layer import KVLayer


class Scratch:
    """Named buffers that are reused by every layer of every step, so that a step allocates nothing.

    The first `take` of a name reserves `max_rows` rows; the run of the largest step at start-up therefore reserves all of them,
    and `nbytes` is the workspace in the memory bill. Addresses are stable, as CUDA graphs need.
    """

    def __init__(self, max_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.max_rows, self.dtype, self.device = max_rows, dtype, device
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, rows: int, width: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Uninitialised [rows, width] view of the buffer `name`; contents last until the same name is taken again."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape[1] < width or buffer.shape[0] < rows:
            shape = (max(rows, self.max_rows), max(width, buffer.shape[1] if buffer is not None else 0))
            # zeros, then touched: the pages must be resident at start-up, not at the first long prompt
            buffer = torch.empty(shape, dtype=dtype or self.dtype, device=self.device).zero_()
            self._buffers[name] = buffer
        return buffer.view(-1)[: rows * width].view(rows, width)

    @property
    def nbytes(self) -> int:
        """Bytes reserved so far."""
        return sum(b.nbytes for b in self._buffers.values())


@dataclass(slots=True)
class AttentionMeta:
    """Where the keys and values of each sequence are. B sequences, T new tokens, S tokens a block.

    `query_lens` and `kv_lens_host` are the host's copies, for kernels that loop on the host (CPU); device kernels use the tensors. Both lists are empty
    where the host does not know, as in a captured step: then T, B and `num_decode` are upper bounds, sequences after the first `num_decode` may have
    any number of tokens, none included, and rows of the step from query_start[B] on belong to no sequence: their attention is not written.
    """

    query_start: torch.Tensor  # int32 [B + 1]; rows query_start[b]..query_start[b + 1] of the step belong to sequence b
    kv_lens: torch.Tensor  # int32 [B]; keys visible to the last new token, the new ones included
    block_table: torch.Tensor  # int32 [B, max_blocks]; row-contiguous, entries past the sequence's blocks are undefined
    slot_mapping: torch.Tensor  # int64 [T]; block * S + offset where each new token's K and V go
    query_lens: list[int]
    kv_lens_host: list[int]
    num_decode: int  # leading sequences with one new token
    whole_weights: bool = False  # the products around are of weights of 16 bits: what may run beside them depends on it
    workspace: dict[object, object] = field(default_factory=dict)  # what the kernels of the step's layers share, by their own names


@dataclass(slots=True)
class ForwardInputs:
    """One step's input. T new tokens of B sequences, flat; R rows of which logits are wanted."""

    token_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    rope_lengths: torch.Tensor | None  # int64 [T], the length that fixes a dynamic rope's base; None = rope does not depend on it
    attention: AttentionMeta
    kv: list[KVLayer]  # per layer
    logit_rows: torch.Tensor  # int64 [R]
    scratch: Scratch
    every_row: bool = False  # logit_rows are all T rows, in order
    cos: torch.Tensor | None = None  # float32 [T, R/2]: filled once by the model from its rope, shared by all layers
    sin: torch.Tensor | None = None
    q_scale: torch.Tensor | None = None  # float32 [T] logn scale of queries, or None
    replaced_rows: torch.Tensor | None = None  # int64 [P]: rows of the step that stand for parts of pictures
    replacements: torch.Tensor | None = None  # [P, M]: what they have instead of an embedding
