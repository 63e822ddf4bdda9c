"""Compiles `native/*.cpp` with g++ at first use, keeps the shared object in the user's cache folder and loads it.

Nothing raises: where there is no compiler, no cache folder or no fitting CPU, the result carries the reason and torch does the work.
The library must use the OpenMP runtime that torch has already mapped: two pools of spinning threads on the same cores would halve both.
So objects are linked against that very file, never with the compiler's own libgomp when torch has one.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch  # noqa: F401  maps the OpenMP runtime that the library shares

from lmdeploy.log import get_logger

logger = get_logger(__name__)

SOURCES = Path(__file__).parent / "native"
CACHE = Path("~/.cache/lmdeploy")
COMPILE_SECONDS = 120
# -ffp-contract=fast (g++'s default) is meant: every path of an operator is compiled with the same fused chains.
BASE_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized")


@dataclass(frozen=True, slots=True)
class Variant:
    """A set of instructions: the names in /proc/cpuinfo that it needs and the compiler's flags for them."""

    name: str
    needs: frozenset[str]
    flags: tuple[str, ...]


_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
_NEEDS_AVX2 = frozenset(("avx2", "fma", "f16c", "bmi1", "bmi2"))
_NEEDS_AVX512 = _NEEDS_AVX2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
_NEEDS_AMX = frozenset(("avx512_bf16", "avx512vbmi", "amx_tile", "amx_bf16", "amx_int8"))
#: Best first. Flags are named one by one: -march=native on a virtual machine may promise what the host does not do.
VARIANTS = (
    Variant("amx", _NEEDS_AVX512 | _NEEDS_AMX, (*_AVX512, "-mavx512bf16", "-mavx512vbmi", "-mamx-tile", "-mamx-bf16", "-mamx-int8")),
    Variant("avx512", _NEEDS_AVX512, _AVX512),
    Variant("avx2", _NEEDS_AVX2, _AVX2),
    Variant("generic", frozenset(), ()),
)


@dataclass(frozen=True, slots=True)
class NativeBuild:
    """The loaded library and its variant, or None and why; `notes` tells which better variants failed."""

    library: ctypes.CDLL | None
    variant: str = ""
    path: Path | None = None
    reason: str = ""
    notes: tuple[str, ...] = ()


class BuildError(Exception):
    """Why a variant could not be compiled or loaded; never leaves this file."""


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction sets that the kernel reports for the first CPU; empty where it does not say."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()


def mapped_openmp(maps: Path = Path("/proc/self/maps")) -> list[Path]:
    """OpenMP runtimes mapped in this process, in the order of their addresses."""
    try:
        lines = maps.read_text().splitlines()
    except OSError:
        return []
    names = [line.split(maxsplit=5)[5] for line in lines if re.search(r"/lib(gomp|iomp5|omp)[-.\w]*\.so", line)]
    return [Path(name) for name in dict.fromkeys(names)]


def _run(command: list[str]) -> str:
    """Standard output of a compiler call."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]}: {error}") from None
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise BuildError(f"{Path(command[0]).name} failed: {first}")
    return done.stdout


def _private_folder(folder: Path) -> Path:
    """Create `folder` for this user alone; refuse one that others could have put a library into."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        facts = folder.stat()
    except OSError as error:
        raise BuildError(f"cache folder {folder}: {error.strerror or error}") from None
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022:
        raise BuildError(f"cache folder {folder} belongs to or is writable by other users; run chmod 700 on it or choose another")
    return folder


def _default_folder() -> Path:
    """The user's cache folder, or where that cannot be written (read-only home, a service without one) a private folder for temporary files."""
    try:
        return _private_folder(CACHE.expanduser())
    except (BuildError, RuntimeError) as error:  # RuntimeError: no home folder is known
        try:
            return _private_folder(Path(tempfile.gettempdir()) / f"lmdeploy-{os.getuid()}")
        except BuildError as second:
            raise BuildError(f"{error}; {second}") from None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One builder at a time, among threads and processes; the lock dies with its holder."""
    with open(folder / "build.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _key(variant: Variant, compiler: str, openmp: list[Path]) -> str:
    """Name of the object that these sources, flags, compiler and OpenMP runtime make."""
    digest = hashlib.sha256()
    for part in (*BASE_FLAGS, *variant.flags, _run([compiler, "-dumpfullversion", "-dumpmachine"]), *(path.name for path in openmp[:1])):
        digest.update(part.encode() + b"\0")
    for source in sorted(SOURCES.glob("*.[ch]pp")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def _compile(variant: Variant, compiler: str, openmp: list[Path], target: Path) -> None:
    """Compile the sources side by side, link, and move the result to `target` in one step, so that nobody loads half a file."""
    logger.warning("compiling the CPU kernels, once; later starts take them from %s", target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent) as name, ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        folder = Path(name)
        sources = sorted(SOURCES.glob("*.cpp"), key=lambda source: -source.stat().st_size)  # the longest first
        objects = [str(folder / f"{source.stem}.o") for source in sources]
        commands = [[compiler, *BASE_FLAGS, *variant.flags, "-c", str(source), "-o", made] for source, made in zip(sources, objects, strict=True)]
        list(pool.map(_run, commands))
        linked = folder / target.name
        runtime = [str(openmp[0])] if openmp else ["-fopenmp"]
        _run([compiler, "-shared", *objects, "-o", str(linked), *runtime])
        linked.chmod(0o700)
        os.replace(linked, target)


def _open(path: Path) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _build(variant: Variant, compiler: str, folder: Path) -> tuple[ctypes.CDLL, Path]:
    """Load the cached object; compile when it is missing, and once more when it is damaged."""
    openmp = mapped_openmp()
    target = folder / f"kernels-{variant.name}-{_key(variant, compiler, openmp)}.so"
    with _locked(folder):
        library = _open(target) if target.exists() else None
        if library is None:
            _compile(variant, compiler, openmp, target)
            library = _open(target)
    if library is None:
        raise BuildError(f"{target} was built but does not load")
    if variant.name == "amx" and not library.lmd_enable_amx():
        raise BuildError("the operating system refuses AMX tile state to this process")
    return library, target


def load_native(cache_dir: Path | None = None, compiler: str = "g++", variants: tuple[Variant, ...] = VARIANTS) -> NativeBuild:
    """The kernels for this CPU: the best variant that it has and that compiles. Takes seconds once, milliseconds afterwards."""
    if platform.system() != "Linux":
        return NativeBuild(None, reason=f"native kernels are built on Linux only, this is {platform.system()}")
    found = shutil.which(compiler)
    if found is None:
        return NativeBuild(None, reason=f"no {compiler} in PATH; install it (apt install g++) for the fast CPU kernels")
    features, notes = cpu_features(), []
    try:
        folder = _private_folder(cache_dir.expanduser()) if cache_dir is not None else _default_folder()
        for variant in variants:
            missing = variant.needs - features
            if missing:
                notes.append(f"{variant.name}: CPU lacks {' '.join(sorted(missing))}")
                continue
            try:
                library, path = _build(variant, found, folder)
                return NativeBuild(library, variant.name, path, notes=tuple(notes))
            except BuildError as error:
                notes.append(f"{variant.name}: {error}")
    except (BuildError, OSError) as error:
        return NativeBuild(None, reason=str(error), notes=tuple(notes))
    return NativeBuild(None, reason="; ".join(notes), notes=tuple(notes))
