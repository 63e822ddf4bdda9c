"""Building the native library: once, atomically, against torch's own OpenMP; and a plain reason when it cannot be done."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmdeploy.kernels import build
from lmdeploy.kernels.build import VARIANTS, NativeBuild, cpu_features, load_native

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
GENERIC = VARIANTS[-1:]
LMDEPLOY = Path(__file__).parents[2]


@pytest.fixture
def small_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources that compile in a moment, where the test is about when and where and not about what."""
    folder = tmp_path_factory.mktemp("native")
    function = "int lmd_enable_amx() {\nint n = 0;\n#pragma omp parallel reduction(+ : n)\nn++;\nreturn n > 0;\n}\n"
    (folder / "small.cpp").write_text('extern "C" __attribute__((visibility("default"))) ' + function)
    return folder


def test_the_library_shares_torchs_openmp_runtime(best_build: NativeBuild, small_sources: Path, tmp_path: Path) -> None:
    assert best_build.path is not None
    assert str(best_build.path) in Path("/proc/self/maps").read_text()
    code = (
        "import sys; from pathlib import Path; from lmdeploy.kernels import build; build.SOURCES = Path(sys.argv[2]);"
        "assert build.load_native(Path(sys.argv[1]) / 'cache').library.lmd_enable_amx() == 1; print(len(build.mapped_openmp()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(small_sources)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1", "other packages (sentencepiece) bring one of their own, so a fresh process is asked"


def test_a_second_load_compiles_nothing(best_build: NativeBuild, native_cache: Path) -> None:
    assert best_build.path is not None
    before = best_build.path.stat().st_mtime_ns
    again = load_native(native_cache)
    assert again.path == best_build.path and best_build.path.stat().st_mtime_ns == before


@needs_compiler
def test_processes_that_start_together_compile_once_and_leave_no_rubbish(small_sources: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lmdeploy.kernels import build; from lmdeploy.kernels.build import VARIANTS, load_native;"
        "build.SOURCES = Path(sys.argv[2]); b = load_native(Path(sys.argv[1]), variants=VARIANTS[-1:]); print(b.path, b.path.stat().st_mtime_ns)"
    )
    folder = tmp_path / "new" / "cache"
    started = [subprocess.Popen([sys.executable, "-c", code, str(folder), str(small_sources)], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = {process.communicate(timeout=100)[0] for process in started}
    assert len(answers) == 1 and "kernels-generic-" in answers.pop()
    assert sorted(path.suffix for path in folder.iterdir()) == [".lock", ".so"]
    assert folder.stat().st_mode & 0o777 == 0o700


@needs_compiler
def test_a_damaged_object_is_compiled_again(small_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "SOURCES", small_sources)
    (tmp_path / "whole").mkdir(mode=0o700)
    built = load_native(tmp_path / "whole", variants=GENERIC)
    assert built.path is not None
    (tmp_path / built.path.name).write_bytes(b"not a library")
    tmp_path.chmod(0o700)
    again = load_native(tmp_path, variants=GENERIC)
    assert again.library is not None and again.path == tmp_path / built.path.name and again.path.stat().st_size > 10_000


def test_no_compiler_is_a_reason_and_not_an_error(tmp_path: Path) -> None:
    found = load_native(tmp_path, compiler="no-such-compiler")
    assert found.library is None and "no no-such-compiler in PATH" in found.reason


def test_a_compiler_that_fails_is_a_reason_for_each_variant(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    found = load_native(tmp_path, compiler="false")
    assert found.library is None and "false failed" in found.reason and len(found.notes) == len(VARIANTS)


@needs_compiler
def test_a_cache_that_others_can_write_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    found = load_native(tmp_path)
    assert found.library is None and "writable by other users" in found.reason


@needs_compiler
def test_a_cache_that_cannot_be_made_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = load_native(tmp_path / "file" / "cache")
    assert found.library is None and "cache folder" in found.reason


def test_cpu_features_are_read_from_both_kinds_of_cpuinfo(tmp_path: Path) -> None:
    (tmp_path / "x86").write_text("processor: 0\nflags\t\t: fpu avx2 fma\nbugs: x\n")
    (tmp_path / "arm").write_text("processor: 0\nFeatures\t: fp asimd\n")
    assert cpu_features(tmp_path / "x86") == {"fpu", "avx2", "fma"}
    assert cpu_features(tmp_path / "arm") == {"fp", "asimd"}
    assert cpu_features(tmp_path / "missing") == frozenset()


def test_every_variant_asks_the_cpu_for_what_its_flags_use() -> None:
    for variant in VARIANTS:
        for flag in variant.flags:
            feature = flag.removeprefix("-m").replace("bf16", "_bf16").replace("-", "_").replace("__", "_")
            assert "prefer" in flag or feature in variant.needs or f"{feature}1" in variant.needs, flag


@needs_compiler
def test_without_a_writable_home_a_private_temporary_folder_serves(small_sources: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from lmdeploy.kernels import build;"
        "build.SOURCES = Path(sys.argv[1]); b = build.load_native(); print(b.path, b.reason)"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": "/proc/nowhere", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", code, str(small_sources)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=LMDEPLOY, check=True)
    assert done.stdout.startswith(str(tmp_path)), done.stdout
    assert (tmp_path / f"lmdeploy-{os.getuid()}").stat().st_mode & 0o077 == 0
