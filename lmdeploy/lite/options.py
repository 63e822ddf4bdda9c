"""`AwqConfig`: every option of `lmdeploy lite auto_awq`, once; the flags are made from it. This module must not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from lmdeploy.config import DTYPES, _Checked, at_least, between, option, remembers_given
from lmdeploy.errors import ConfigError

DATASETS = ("ptb", "wikitext2", "c4", "pileval")


@remembers_given
@dataclass
class AwqConfig(_Checked):
    """How to make a 4-bit copy of a model. Raises ConfigError naming field, value and limit."""

    work_dir: str = option("./work_dir", "folder that the 4-bit model is written to")
    calib_dataset: str = option("ptb", f"calibration text: a .txt or .jsonl file, a folder of them, 'embedded', or {', '.join(DATASETS)} from the hub")
    calib_samples: int = option(128, "windows of text to calibrate with; 0 = plain rounding without data", check=between(0, 1 << 20))
    calib_seqlen: int = option(2048, "tokens in a window", check=between(8, 1 << 20))
    batch_size: int = option(1, "windows computed together", check=between(1, 4096))
    search_scale: bool = option(False, "search the scales and the clipping of every layer by its output error, instead of a fixed formula")
    w_bits: int = option(4, "bits of a weight", choices=(4,))
    w_group_size: int = option(128, "weights of one row that share a scale", check=between(2, 1 << 16))
    w_sym: bool = option(False, "symmetric rounding; not available: AWQ stores a zero point")
    dtype: str = option("auto", "type that calibration computes in; auto: as the engine would choose", choices=DTYPES)
    device: str = option("auto", "where to compute; auto: cuda if there is one, else cpu", choices=("auto", "cuda", "cpu"))
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    download_dir: str | None = option(None, "where the hub's files are kept")
    overwrite: bool = option(False, "replace a model folder that is already at work_dir")
    eval_tokens: int = option(4096, "tokens of held-out text that perplexity is measured on; 0 = not measured", check=at_least(0))

    def __post_init__(self) -> None:
        self._check(lambda _, text: ConfigError(f"{type(self).__name__}: {text}"))
        if self.w_sym:
            raise ConfigError("w_sym=True is not available: the AWQ layout stores a zero point for every group; leave --w-sym out")
        if self.w_group_size % 2:
            raise ConfigError(f"w_group_size={self.w_group_size} is odd; use 32, 64 or 128")
        if not self.work_dir.strip():
            raise ConfigError("work_dir is empty; give the folder that the 4-bit model is written to")
