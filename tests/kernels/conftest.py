"""The native library, compiled once a session for each instruction set that this CPU has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lmdeploy.kernels.build import VARIANTS, NativeBuild, load_native


@pytest.fixture(scope="session")
def native_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of this session's own, so that tests never run yesterday's object; xdist's workers share it (a lock lets one compile)."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return tmp_path_factory.mktemp("native")
    shared = tmp_path_factory.getbasetemp().parent / "native"
    shared.mkdir(mode=0o700, exist_ok=True)
    return shared


@pytest.fixture(scope="session", params=[variant.name for variant in VARIANTS])
def build(request: pytest.FixtureRequest, native_cache: Path) -> NativeBuild:
    """The library of one instruction set; skipped where the CPU or the compiler lacks it."""
    found = load_native(native_cache, variants=tuple(v for v in VARIANTS if v.name == request.param))
    if found.library is None:
        pytest.skip(found.reason)
    return found


@pytest.fixture(scope="session")
def best_build(native_cache: Path) -> NativeBuild:
    """The library that `select` would take here."""
    found = load_native(native_cache)
    if found.library is None:
        pytest.skip(found.reason)
    return found
