"""The folder around the weights: may it be written, is there room, and what is in it besides them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmdeploy.checkpoint.writer import write_error
from lmdeploy.errors import CheckpointError, ConfigError
from lmdeploy.lite.report import FILE

#: Weights and what describes them; everything else of a model folder is copied.
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")
#: What `calibrate` writes; like FILE it marks a folder as made here.
STATISTICS = "activations.json"


def check_work_dir(model: Path, work_dir: Path, *, overwrite: bool) -> None:
    """Raise ConfigError unless the folder is new, empty, or a checkpoint that may be replaced."""
    here, there = model.resolve(), work_dir.resolve()
    if here == there or there in here.parents or here in there.parents:
        raise ConfigError(f"work_dir={str(work_dir)!r} is, holds or lies in the model's own folder {str(model)!r}; give another one")
    if not work_dir.exists():
        return
    if not work_dir.is_dir():
        raise ConfigError(f"work_dir={str(work_dir)!r} is a file; give a folder that is new or empty")
    names = sorted(p.name for p in work_dir.iterdir())
    if not names or FILE in names or STATISTICS in names or (overwrite and "config.json" in names):
        return
    hint = "--overwrite replaces it" if "config.json" in names else "give a new folder"
    raise ConfigError(f"work_dir={str(work_dir)!r} already holds {', '.join(names[:4])}{' and more' if len(names) > 4 else ''}; {hint}")


def check_room(work_dir: Path, needed: int) -> None:
    """Raise CheckpointError when the disk of a folder that is to be made has less than `needed` bytes."""
    place = next(p for p in (work_dir, *work_dir.resolve().parents) if p.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise CheckpointError(f"{place}: about {needed / 1e6:.0f} MB are needed and {free / 1e6:.0f} MB are free; free some space or give another --work-dir")


def copy_other_files(model: Path, target: Path, quantization: Mapping[str, Any]) -> None:
    """Tokenizer, templates and licences as they are; config.json with what the weights became."""
    try:
        for path in sorted(model.iterdir()):
            if path.is_file() and not path.name.endswith(WEIGHTS) and path.name != "config.json":
                shutil.copyfile(path, target / path.name)
        raw = json.loads((model / "config.json").read_text(encoding="utf-8-sig"))
        raw["quantization_config"] = dict(quantization)
        (target / "config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise write_error(target.parent, error) from None
