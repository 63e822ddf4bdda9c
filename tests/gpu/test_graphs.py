"""CUDA graphs and running ahead change nothing but the time: the same tokens as step by step, whatever is asked of the sampler."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lmdeploy.config import PytorchEngineConfig
from lmdeploy.engine.engine import Engine
from lmdeploy.engine.graphs import row_buckets
from lmdeploy.kernels.reference import REFERENCE
from lmdeploy.kernels.select import select
from lmdeploy.messages import Grammar, SamplingParams
from tests.gpu.test_cuda import engine_on, run
from tests.kernels.paged import FORMATS, Shape, error, numbers, paged_case, sequences

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

PROMPTS = [[1, 5119, *range(300, 300 + n)] for n in (3, 17, 64, 65, 200, 1, 254, 255, 256, 500, 513)]
KINDS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(max_new_tokens=40, ignore_eos=True),
    "seeded": SamplingParams(max_new_tokens=40, temperature=1.1, top_p=0.9, seed=7, ignore_eos=True),
    "top-k": SamplingParams(max_new_tokens=40, temperature=0.8, top_k=20, min_p=0.02, seed=3, ignore_eos=True),
    "penalties": SamplingParams(max_new_tokens=40, repetition_penalty=1.3, frequency_penalty=0.5, ignore_eos=True),
    "logprobs": SamplingParams(max_new_tokens=12, logprobs=3, ignore_eos=True),
    "stops": SamplingParams(max_new_tokens=60, stop_token_ids=(5118, 2)),
    "grammar": SamplingParams(
        max_new_tokens=40, stop_token_ids=(5118, 2), grammar=Grammar("json_schema", '{"type": "object", "properties": {"n": {"type": "integer"}}}')
    ),
}


@pytest.fixture(scope="module")
def eager(model_folder: Path) -> Iterator[Engine]:
    torch.backends.cuda.matmul.allow_tf32 = False
    engine = engine_on("cuda", model_folder, eager_mode=True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def graphed(model_folder: Path) -> Iterator[Engine]:
    engine = engine_on("cuda", model_folder)
    yield engine
    engine.close()


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_give_the_tokens_of_eager_steps(kind: str, eager: Engine, graphed: Engine) -> None:
    params = [KINDS[kind]] * len(PROMPTS)
    assert run(graphed, params, PROMPTS) == run(eager, params, PROMPTS)


def test_a_mixture_of_all_kinds_gives_the_same(eager: Engine, graphed: Engine) -> None:
    params = [list(KINDS.values())[i % len(KINDS)] for i in range(len(PROMPTS))]
    assert run(graphed, params, PROMPTS) == run(eager, params, PROMPTS)


def test_answers_without_grammars_beside_others_that_have_some(eager: Engine, graphed: Engine) -> None:
    """They are chosen together, behind the graph; then alone, in it."""
    kinds = [KINDS[name] for name in ("greedy", "seeded", "grammar", "top-k", "penalties", "stops")]
    params = [kinds[i % len(kinds)] for i in range(len(PROMPTS))]
    assert run(graphed, params, PROMPTS) == run(eager, params, PROMPTS)
    rest = [KINDS[name] for name in ("seeded", "greedy", "top-k")] * 3
    assert run(graphed, rest, PROMPTS[:9]) == run(eager, rest, PROMPTS[:9])


def test_penalties_in_graphs_are_those_beside_them(eager: Engine, graphed: Engine) -> None:
    drawn = SamplingParams(max_new_tokens=40, temperature=0.9, top_p=0.9, seed=5, presence_penalty=0.8, frequency_penalty=0.3, ignore_eos=True)
    for params in ([KINDS["penalties"], drawn], [KINDS["penalties"], KINDS["greedy"], drawn, KINDS["seeded"]], list(KINDS.values())):
        wanted = [params[i % len(params)] for i in range(len(PROMPTS))]
        assert run(graphed, wanted, PROMPTS) == run(eager, wanted, PROMPTS)


def test_what_is_made_ready_while_there_is_no_work_changes_nothing(model_folder: Path) -> None:
    engine, params = engine_on("cuda", model_folder), [KINDS["greedy"]] * len(PROMPTS)
    before = run(engine, params, PROMPTS)  # its prefixes stay in the cache
    while engine.prepare_ahead():
        pass
    assert run(engine, params, PROMPTS) == before
    engine.close()


@pytest.mark.parametrize("policy", [0, 8, "k8v4", 4, 16])
def test_every_policy_runs_in_graphs(policy: int | str, model_folder: Path) -> None:
    params = [SamplingParams(max_new_tokens=24, ignore_eos=True)] * len(PROMPTS)
    answers = []
    for eager_mode in (True, False):
        engine = engine_on("cuda", model_folder, quant_policy=policy, eager_mode=eager_mode, dtype="bfloat16")
        answers.append(run(engine, params, PROMPTS))
        engine.close()
    same = sum(a == b for a, b in zip(*answers, strict=True))
    assert same >= len(PROMPTS) - 2, f"{same} of {len(PROMPTS)}"  # near ties may fall otherwise in bfloat16


def test_kernels_that_look_at_the_host_are_not_captured(model_folder: Path) -> None:
    """Attention of the plain torch set loops over lengths on the host: a graph of it would repeat the lengths of its capture."""
    plain = engine_on("cuda", model_folder, PytorchEngineConfig)
    params = [KINDS["greedy"]] * len(PROMPTS)
    once = run(plain, params, PROMPTS)
    assert run(plain, params, PROMPTS) == once
    plain.close()


def test_buckets_cover_every_batch_size() -> None:
    for most in (1, 7, 8, 100, 256, 1000):
        sizes = row_buckets(most)
        assert sizes[-1] == most and sizes == sorted(set(sizes))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decoding", [0, 3])
def test_whole_prompts_go_to_cudnn_and_come_out_right(dtype: torch.dtype, decoding: int) -> None:
    attention = pytest.importorskip("lmdeploy.kernels.triton_kernels.attention")
    shape = Shape(16, 4, 128, 64, dtype, "cuda")
    batch = sequences([(100 + i, 1) for i in range(decoding)] + [(700, 700), (513, 513)])
    case = paged_case(FORMATS["16"], shape, batch)
    keys, values = (torch.cat([numbers(shape, 10 * s.seed + part, s.length, 4, 128)[s.length - s.new :] for s in batch]) for part in range(2))
    assert attention._suits_cudnn(case.q, case.layer, case.meta, 0)
    kernels = select("turbomind", "cuda", dtype, head_dim=128)
    found = torch.full((case.q.shape[0], 16 * 128), float("nan"), dtype=dtype, device="cuda")
    kernels.attention(case.q, keys, values, case.layer, case.meta, 128**-0.5, 0, found)
    assert error(found, case.attend(REFERENCE)) <= 1.2e-2
