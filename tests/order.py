"""Which test files begin first where several workers share them (`pytest -n 2 --dist loadfile`): xdist would take those with the most tests, which are
short ones, and one worker would wait at the end for a long file of a single test that the other one has just begun."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

#: ten processor seconds and more each, the longest first; the others follow as they are collected
LONGEST = (
    "docs/test_docs.py",
    "acceptance/test_rows.py",
    "engine/test_supervisor.py",
    "serving/test_ui.py",
    "acceptance/test_bad_input.py",
    "kernels/test_triton_compiles.py",
    "parity/test_engine_parity.py",
    "cli/test_lite.py",
    "cli/test_chat.py",
    "lite/test_api.py",
    "serving/test_soak.py",
    "engine/test_kv_policies.py",
    "test_pipeline.py",
    "engine/test_guided.py",
    "kernels/triton/test_decode_direct.py",
    "kernels/test_sampling_compiled.py",
    "serving/test_admin.py",
    "lite/test_smooth_quant.py",
    "serving/test_engine_failure.py",
    "lite/test_evaluate.py",
    "acceptance/test_web_rows.py",
    "engine/test_quality.py",
    "serving/test_drain.py",
    "kernels/triton/test_sampling.py",
    "engine/test_memory.py",
    "kernels/triton/test_attention.py",
    "engine/test_grammar_check.py",
    "test_quantised.py",
    "kernels/test_linear_w4_few.py",
    "acceptance/test_tools.py",
    "kernels/test_attention_splits.py",
    "lite/test_compare.py",
    "lite/test_resume.py",
    "lite/test_gptq.py",
    "kernels/test_kv_cpu.py",
    "lite/test_kv_quality.py",
    "cli/test_compare.py",
    "serving/test_flood.py",
    "serving/test_server.py",
    "kernels/triton/test_experts.py",
    "cli/test_serve.py",
)


def longest_first(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The same tests; within a file, and among files that are not named above, as they were."""
    tests = Path(__file__).parent
    rank = {tests / name: place for place, name in enumerate(LONGEST)}
    return sorted(items, key=lambda item: rank.get(item.path, len(rank)))
