"""The buffers that the layers of a step share."""

from __future__ import annotations

import torch

from lmdeploy.inputs import Scratch
from lmdeploy.layers.build import StepBuffers, StepShape

CPU = torch.device("cpu")
NARROW = StepShape(hidden_size=40, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=12)  # attention narrower than the model
WIDE = StepShape(hidden_size=16, num_heads=6, num_kv_heads=2, head_dim=8, mlp_width=64)


def numbered(x: torch.Tensor, first: float) -> None:
    x.copy_((torch.arange(x.shape[0]) + first).unsqueeze(1).expand_as(x))


def test_q_k_and_v_are_parts_of_qkv() -> None:
    step = StepBuffers.take(Scratch(9, torch.float32, CPU), WIDE, 5)
    step.qkv.copy_(torch.arange(5 * 80.0).view(5, 80))
    assert torch.equal(step.q.flatten(1), step.qkv[:, :48])
    assert torch.equal(step.k.flatten(1), step.qkv[:, 48:64])
    assert torch.equal(step.v.flatten(1), step.qkv[:, 64:])


def test_no_two_buffers_overlap() -> None:
    for shape in (NARROW, WIDE):
        step = StepBuffers.take(Scratch(9, torch.float32, CPU), shape, 9)
        buffers = [step.residual, step.normed, step.proj, step.qkv, step.attn, step.gate_up, step.act]
        for number, buffer in enumerate(buffers):
            buffer.fill_(number)
        assert all(bool((buffer == number).all()) for number, buffer in enumerate(buffers))


def test_selected_rows_are_copies_and_the_new_buffers_do_not_overlap() -> None:
    for shape in (NARROW, WIDE):
        scratch = Scratch(9, torch.float32, CPU)
        step = StepBuffers.take(scratch, shape, 9)
        numbered(step.attn, 100)
        numbered(step.residual, 200)
        few = step.select(scratch, shape, torch.tensor([8, 0, 3]), step.attn)
        for buffer in (few.normed, few.proj, few.gate_up, few.act):
            buffer.fill_(-1)
        assert few.attn.shape == (3, shape.num_heads * 8) and few.attn[:, -1].tolist() == [108, 100, 103]
        assert few.residual.shape == (3, shape.hidden_size) and few.residual[:, -1].tolist() == [208, 200, 203]
