"""Calibration text: files of the user's, the hub's data sets when it can be reached, else the text that comes with the package.

The command never dies of a download: whatever goes wrong there becomes a notice, and the embedded text is used. A path that does not
exist is the user's mistake and an error. The last part of the text is held out: perplexity is measured on it and nothing is fitted to it.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from lmdeploy.errors import ConfigError
from lmdeploy.lite.options import DATASETS

Tensor = torch.Tensor

#: Characters that are read of a source: far more than 128 windows of 2048 tokens need.
MAX_CHARS = 16 << 20
#: Fewer tokens tell nothing about a model.
MIN_TOKENS = 64
#: Perplexity is measured on windows of at most so many tokens.
EVAL_WINDOW = 1024
SUFFIXES = (".txt", ".md", ".jsonl")
TEXT_KEYS = ("text", "content", "sentence")

#: name -> (repository, file) of a copy that needs no reader beyond the standard library
HUB_FILES = {
    "wikitext2": ("ggml-org/ci", "wikitext-2-raw-v1.zip"),
    "c4": ("allenai/c4", "en/c4-validation.00000-of-00008.json.gz"),
}


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """The text, where it is from, and what the user must know about that ('' = nothing)."""

    text: str
    origin: str
    notice: str = ""


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows int64 [n, L] to calibrate with, and held-out ones for perplexity."""

    samples: Tensor
    held_out: list[list[int]]
    notice: str = ""


def load_text(name: str, download_dir: str | None = None) -> CalibrationText:
    """The text that `--calib-dataset` names."""
    path = Path(name).expanduser()
    if name not in (*DATASETS, "embedded") or path.exists():
        return CalibrationText(_read_path(path, name)[:MAX_CHARS], str(path))
    if name == "embedded":
        return CalibrationText(embedded_text(), "the embedded text")
    try:
        return CalibrationText(_from_hub(name, download_dir)[:MAX_CHARS], f"{name} from the hub")
    except Exception as error:  # network libraries raise many types, and none of them may end the command
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        notice = f"{name} cannot be had ({reason}): calibrating with the text that comes with lmdeploy; --calib-dataset FILE takes your own"
        return CalibrationText(embedded_text(), "the embedded text", notice)


def embedded_text() -> str:
    """The text in the package; scripts/make_calibration_text.py made it."""
    return (resources.files("lmdeploy") / "assets" / "calibration.txt").read_text(encoding="utf-8")


def _read_path(path: Path, name: str) -> str:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise ConfigError(f"calib_dataset={name!r}: the folder has no {', '.join(SUFFIXES)} file")
        return "\n\n".join(_read_file(file) for file in files)
    if not path.is_file():
        raise ConfigError(f"calib_dataset={name!r} is neither a file or folder nor one of embedded, {', '.join(DATASETS)}")
    return _read_file(path)


def _read_file(path: Path) -> str:
    """A text file, or the text fields of a JSONL file."""
    try:
        with path.open(encoding="utf-8") as stream:
            return "\n\n".join(_fields(stream, path)) if path.suffix.lower() == ".jsonl" else stream.read(MAX_CHARS)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None


def _fields(lines: Iterator[str] | io.TextIOBase, path: Path | str) -> Iterator[str]:
    size = 0
    for number, line in enumerate(lines, 1):
        if size > MAX_CHARS:
            return
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: not valid JSON: {error}") from None
        text = value if isinstance(value, str) else next((value[k] for k in TEXT_KEYS if isinstance(value, dict) and isinstance(value.get(k), str)), None)
        if text is None:
            raise ConfigError(f"{path}, line {number}: has no text; a field named {' or '.join(TEXT_KEYS)} is needed")
        size += len(text)
        yield text


def _from_hub(name: str, download_dir: str | None) -> str:
    """The data set's text; raises whatever the hub does."""
    if name not in HUB_FILES:
        raise ConfigError("the hub has it only in formats that need further packages (parquet, zstandard)")
    from huggingface_hub import hf_hub_download

    repository, file = HUB_FILES[name]
    path = hf_hub_download(repository, file, repo_type="dataset", cache_dir=download_dir, etag_timeout=5)
    if file.endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            member = next(n for n in archive.namelist() if "train" in n)
            with archive.open(member) as stream:
                return stream.read(MAX_CHARS).decode("utf-8", errors="replace")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return "\n\n".join(_fields(lines, file))


def cut_windows(ids: list[int], samples: int, seqlen: int, eval_tokens: int) -> Windows:
    """`samples` windows of `seqlen` tokens evenly spaced over the text, without its last tenth, which is held out."""
    if len(ids) < MIN_TOKENS:
        raise ConfigError(f"the calibration text has {len(ids)} tokens; at least {MIN_TOKENS} are needed, and some ten thousand are good")
    tail = max(MIN_TOKENS // 4, min(len(ids) // 10, eval_tokens)) if eval_tokens else 0
    body, rest = ids[: len(ids) - tail], ids[len(ids) - tail :]
    length = min(seqlen, len(body))
    count = min(samples, len(body) // length)
    notice = ""
    if samples and (count < samples or length < seqlen):
        notice = f"the calibration text gives {count} windows of {length} tokens; {samples} of {seqlen} were asked for"
    step = (len(body) - length) // max(1, count - 1)
    chosen = [body[i * step : i * step + length] for i in range(count)]
    width = max(2, min(length - 1, EVAL_WINDOW))
    held_out = [part for start in range(0, len(rest), width) if len(part := rest[start : start + width]) >= 2]
    return Windows(torch.tensor(chosen, dtype=torch.int64).view(count, length), held_out, notice)
