"""Experts on the GPU: the grouped products of Mixtral's and Qwen3-30B-A3B's layers, and tiny models whose steps are captured, or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lmdeploy.engine.executor.local import LocalExecutor
from lmdeploy.messages import SamplingParams
from tests.gpu.test_cuda import engine_on, run
from tests.gpu.test_graphs import PROMPTS
from tests.helpers import LLAMA_CONFIG

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
experts = pytest.importorskip("lmdeploy.kernels.triton_kernels.experts")
routing = pytest.importorskip("lmdeploy.kernels.triton_kernels.routing")

pytestmark = pytest.mark.gpu
Tensor = torch.Tensor
DEVICE = torch.device("cuda", 0)
#: experts, choices, model width, inner width
SHAPES = {"mixtral": (8, 2, 4096, 14336), "qwen3-30b-a3b": (128, 8, 2048, 768), "ragged": (5, 3, 1000, 344)}
STEP = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float32: 1e-5}
MOE = {
    **LLAMA_CONFIG, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 6000, "num_experts": 12, "num_experts_per_tok": 3,
    "moe_intermediate_size": 40, "norm_topk_prob": True, "max_position_embeddings": 1024,
}  # fmt: skip


def made(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """gate_up and down."""
    count, _, width, inner = SHAPES[name]
    torch.manual_seed(0)
    return tuple(torch.empty(size, device=DEVICE, dtype=dtype).normal_(0, size[2] ** -0.5) for size in ((count, 2 * inner, width), (count, width, inner)))


def routed(name: str, rows: int) -> tuple[Tensor, Tensor]:
    """ids and weights."""
    count, choices, _, _ = SHAPES[name]
    weights, ids = torch.softmax(torch.randn(rows, count, device=DEVICE), -1).topk(choices)
    return ids, weights


def wanted(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """In float32, expert by expert."""
    total = torch.zeros(x.shape, device=DEVICE)
    for expert in torch.unique(ids).tolist():
        token, choice = torch.where(ids == expert)
        gate, up = (x[token].float() @ gate_up[expert].float().T).chunk(2, dim=1)
        total.index_add_(0, token, (torch.nn.functional.silu(gate) * up) @ down[expert].float().T * weights[token, choice].unsqueeze(1))
    return total


@pytest.mark.parametrize("dtype", STEP, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_experts_agree_with_float32(name: str, dtype: torch.dtype) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    gate_up, down = made(name, dtype)
    for rows in (1, 8, 64, 256, 1200) if dtype is not torch.float32 else (1, 8, 64):
        x, (ids, weights) = torch.randn(rows, gate_up.shape[2], device=DEVICE).to(dtype), routed(name, rows)
        if rows == 64:
            ids[:] = ids[0]  # all of them choose the same
        out = torch.full_like(x, float("nan"))
        experts.experts(x, gate_up, down, ids, weights, out)
        expected = wanted(x, gate_up, down, ids, weights)
        assert (out.float() - expected).abs().max() <= STEP[dtype] * expected.abs().max(), rows


@pytest.mark.parametrize("name", SHAPES)
def test_a_row_has_the_same_bits_whatever_the_others_choose(name: str) -> None:
    gate_up, down = made(name, torch.bfloat16)
    for rows in (8, 64, 600):
        x, (ids, weights) = torch.randn(rows, gate_up.shape[2], device=DEVICE).bfloat16(), routed(name, rows)
        once, again = torch.empty_like(x), torch.empty_like(x)
        experts.experts(x, gate_up, down, ids, weights, once)
        x[1:], ids[1:] = torch.randn_like(x[1:]), ids[:1]
        experts.experts(x, gate_up, down, ids, weights, again)
        assert torch.equal(once[0], again[0])


@pytest.mark.parametrize("rows", [1, 8, 200])
def test_layers_in_a_graph_give_the_bits_of_calls_one_by_one(rows: int) -> None:
    """One layer after the other on few buffers, the router's choice of each made by what the one before computed: the graph serves every choice."""
    (count, choices, width, _), layers = SHAPES["ragged"], 12
    gate_up, down = made("ragged", torch.bfloat16)
    router, x = torch.randn(width, count, device=DEVICE).bfloat16(), torch.empty(rows, width, device=DEVICE, dtype=torch.bfloat16)
    ids, weights = torch.empty(rows, choices, device=DEVICE, dtype=torch.int64), torch.empty(rows, choices, device=DEVICE)
    first, out = torch.empty_like(x), torch.empty_like(x)

    def chain(wait: bool) -> None:
        x.copy_(first)
        for _ in range(layers):
            routing.choose_experts(x @ router, True, ids, weights)
            experts.experts(x, gate_up, down, ids, weights, out)
            x.copy_(torch.nn.functional.layer_norm(x + out, (width,)))  # else it grows without end
            if wait:
                torch.cuda.synchronize()

    first.normal_()
    chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(False)
    for _ in range(5):
        first.normal_()
        chain(True)
        expected = x.clone()
        graph.replay()
        assert x.isfinite().all() and torch.equal(x, expected)


def test_the_choice_of_experts_is_that_of_torch() -> None:
    for rows, count, choices in ((1, 128, 8), (300, 128, 8), (64, 8, 2), (5, 60, 4)):
        scores = torch.stack([torch.randperm(count) for _ in range(rows)]).to(DEVICE).bfloat16() / 16
        ids, weights = torch.empty(rows, choices, device=DEVICE, dtype=torch.int64), torch.empty(rows, choices, device=DEVICE)
        routing.choose_experts(scores, True, ids, weights)
        shares, chosen = torch.softmax(scores, dim=-1, dtype=torch.float32).topk(choices)
        assert torch.equal(ids, chosen)
        torch.testing.assert_close(weights, shares / shares.sum(-1, keepdim=True), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_graphed_experts_give_the_tokens_of_eager_ones(dtype: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MOE))
    params, answers = [SamplingParams(max_new_tokens=32, ignore_eos=True)] * len(PROMPTS), []
    for eager_mode in (True, False):
        engine = engine_on("cuda", tmp_path, random_weights=True, eager_mode=eager_mode, dtype=dtype)
        assert captures(engine) != eager_mode
        answers.append(run(engine, params, PROMPTS))
        engine.close()
    same = sum(a == b for a, b in zip(*answers, strict=True))
    assert same >= len(PROMPTS) - (2 if dtype == "bfloat16" else 0)  # near ties may fall otherwise in bfloat16


def test_quantised_experts_are_not_captured(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MOE, "hidden_size": 128, "moe_intermediate_size": 64}))
    engine = engine_on("cuda", tmp_path, random_weights=True, model_format="fp8", dtype="bfloat16")
    assert not captures(engine)
    assert all(len(answer) == 4 for answer in run(engine, [SamplingParams(max_new_tokens=4, ignore_eos=True)] * 3, PROMPTS[:3]))
    engine.close()


def captures(engine: object) -> bool:
    """Whether an engine makes graphs of its steps."""
    executor = engine._executor  # type: ignore[attr-defined]
    assert isinstance(executor, LocalExecutor) and executor._runner is not None
    return executor._runner.graphed
