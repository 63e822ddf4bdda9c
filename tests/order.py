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
    "kernels/triton/test_decode_direct.py",
    "engine/test_supervisor.py",
    "parity/test_engine_parity.py",
    "acceptance/test_bad_input.py",
    "cli/test_chat.py",
    "lite/test_api.py",
    "serving/test_ui.py",
    "serving/test_soak.py",
    "engine/test_kv_policies.py",
    "test_pipeline.py",
    "kernels/test_triton_compiles.py",
    "lite/test_smooth_quant.py",
    "cli/test_lite.py",
    "kernels/triton/test_sampling.py",
    "serving/test_engine_failure.py",
    "kernels/triton/test_attention.py",
    "engine/test_guided.py",
    "kernels/test_kv_cpu.py",
    "engine/test_quality.py",
    "engine/test_memory.py",
    "acceptance/test_web_rows.py",
    "serving/test_admin.py",
    "lite/test_kv_quality.py",
    "serving/test_flood.py",
    "lite/test_evaluate.py",
    "lite/test_resume.py",
    "serving/test_drain.py",
    "lite/test_gptq.py",
    "test_quantised.py",
    "cli/test_compare.py",
    "kernels/triton/test_normed.py",
    "kernels/test_build.py",
    "lite/test_quality.py",
    "kernels/triton/test_experts.py",
    "kernels/triton/test_linear_w4.py",
)


def longest_first(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The same tests; within a file, and among files that are not named above, as they were."""
    tests = Path(__file__).parent
    rank = {tests / name: place for place, name in enumerate(LONGEST)}
    return sorted(items, key=lambda item: rank.get(item.path, len(rank)))
