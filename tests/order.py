"""Which test files begin first where several workers share them (`pytest -n 2 --dist loadfile`): xdist would take those with the most tests, which are
short ones, and one worker would wait at the end for a long file of a single test that the other one has just begun."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

#: twenty processor seconds and more each, the longest first; the others follow as they are collected
LONGEST = (
    "acceptance/test_rows.py",
    "docs/test_docs.py",
    "kernels/triton/test_sampling.py",
    "engine/test_supervisor.py",
    "kernels/triton/test_decode_direct.py",
    "lite/test_api.py",
    "parity/test_engine_parity.py",
    "cli/test_chat.py",
    "acceptance/test_bad_input.py",
    "kernels/test_triton_compiles.py",
    "kernels/triton/test_attention.py",
    "lite/test_smooth_quant.py",
    "serving/test_soak.py",
    "kernels/triton/test_normed.py",
    "kernels/triton/test_experts.py",
    "cli/test_lite.py",
    "test_pipeline.py",
    "engine/test_kv_policies.py",
    "serving/test_flood.py",
    "kernels/triton/test_linear_w4.py",
    "engine/test_guided.py",
    "serving/test_engine_failure.py",
    "lite/test_resume.py",
    "serving/test_ui.py",
    "kernels/test_kv_cpu.py",
    "acceptance/test_web_rows.py",
    "lite/test_evaluate.py",
    "engine/test_memory.py",
    "serving/test_admin.py",
    "test_quantised.py",
    "lite/test_kv_quality.py",
    "kernels/test_build.py",
    "engine/test_quality.py",
    "serving/test_drain.py",
    "cli/test_compare.py",
    "lite/test_gptq.py",
    "lite/test_quality.py",
)


def longest_first(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The same tests; within a file, and among files that are not named above, as they were."""
    tests = Path(__file__).parent
    rank = {tests / name: place for place, name in enumerate(LONGEST)}
    return sorted(items, key=lambda item: rank.get(item.path, len(rank)))
