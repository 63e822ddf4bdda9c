"""Which test files begin first where several workers share them (`pytest -n 2 --dist loadfile`): xdist would take those with the most tests, which are
short ones, and one worker would wait at the end for a long file of a single test that the other one has just begun."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

#: minutes or tens of seconds each, the longest first; the others follow as they are collected
LONGEST = (
    "kernels/triton/test_attention.py",
    "docs/test_docs.py",
    "acceptance/test_rows.py",
    "engine/test_supervisor.py",
    "acceptance/test_bad_input.py",
    "parity/test_engine_parity.py",
    "lite/test_api.py",
    "serving/test_engine_failure.py",
    "serving/test_soak.py",
    "cli/test_chat.py",
    "engine/test_memory.py",
    "lite/test_smooth_quant.py",
    "lite/test_resume.py",
    "test_pipeline.py",
    "kernels/triton/test_linear_w4.py",
    "kernels/triton/test_kv_write.py",
    "kernels/triton/test_normed.py",
    "kernels/triton/test_decode_direct.py",
    "lite/test_kv_quality.py",
    "lite/test_quality.py",
    "acceptance/test_web_rows.py",
    "kernels/test_triton_compiles.py",
    "kernels/test_build.py",
    "lite/test_evaluate.py",
    "serving/test_ui.py",
    "serving/test_admin.py",
    "serving/test_drain.py",
    "serving/test_http_overhead.py",
    "cli/test_lite.py",
    "cli/test_compare.py",
    "engine/test_kv_policies.py",
    "engine/test_guided.py",
    "test_quantised.py",
)


def longest_first(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The same tests; within a file, and among files that are not named above, as they were."""
    tests = Path(__file__).parent
    rank = {tests / name: place for place, name in enumerate(LONGEST)}
    return sorted(items, key=lambda item: rank.get(item.path, len(rank)))
