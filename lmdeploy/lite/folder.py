"""The folder around the weights: may it be written, and what is in it besides them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from lmdeploy.errors import ConfigError
from lmdeploy.lite.options import AwqConfig
from lmdeploy.lite.report import FILE

#: Weights and what describes them; everything else of a model folder is copied.
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")


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
    if not names or FILE in names or (overwrite and "config.json" in names):
        return
    hint = "--overwrite replaces it" if "config.json" in names else "give a new folder"
    raise ConfigError(f"work_dir={str(work_dir)!r} already holds {', '.join(names[:4])}{' and more' if len(names) > 4 else ''}; {hint}")


def copy_other_files(model: Path, target: Path, config: AwqConfig, kept: Sequence[str]) -> None:
    """Tokenizer, templates and licences as they are; config.json with what the weights became. `kept`: whole names of modules that stay 16 bit."""
    for path in sorted(model.iterdir()):
        if path.is_file() and not path.name.endswith(WEIGHTS) and path.name != "config.json":
            shutil.copyfile(path, target / path.name)
    raw = json.loads((model / "config.json").read_text(encoding="utf-8-sig"))
    awq = {"quant_method": "awq", "version": "gemm", "bits": config.w_bits, "group_size": config.w_group_size, "zero_point": True}
    raw["quantization_config"] = {**awq, "modules_to_not_convert": list(kept)} if kept else awq
    (target / "config.json").write_text(json.dumps(raw, indent=2, ensure_ascii=False), encoding="utf-8")
