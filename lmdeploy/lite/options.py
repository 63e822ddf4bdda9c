"""The options of the `lmdeploy lite` commands that write a model, once; the flags are made from them. This module must not import torch."""

from __future__ import annotations

from dataclasses import dataclass

from lmdeploy.checked import CheckedOptions, at_least, between, option, remembers_given
from lmdeploy.config import DTYPES
from lmdeploy.errors import ConfigError

DATASETS = ("ptb", "wikitext2", "c4", "pileval")
#: spelling -> the type that is stored
QUANT_DTYPES = {"int8": "int8", "fp8": "float8_e4m3fn", "float8_e4m3fn": "float8_e4m3fn"}


@dataclass
class LiteConfig(CheckedOptions):
    """What every command has. Raises ConfigError naming field, value and limit."""

    work_dir: str = option("./work_dir", "folder that is written")
    calib_dataset: str = option("ptb", f"calibration text: a .txt or .jsonl file, a folder of them, 'embedded', or {', '.join(DATASETS)} from the hub")
    calib_samples: int = option(128, "windows of text to calibrate with; 0 = plain rounding without data", check=between(0, 1 << 20))
    calib_seqlen: int = option(2048, "tokens in a window", check=between(8, 1 << 20))
    batch_size: int = option(1, "windows computed together", check=between(1, 4096))
    dtype: str = option("auto", "type that calibration computes in; auto: as the engine would choose", choices=DTYPES)
    device: str = option("auto", "where to compute; auto: cuda if there is one, else cpu", choices=("auto", "cuda", "cpu"))
    revision: str | None = option(None, "branch, tag or commit of a hub model")
    download_dir: str | None = option(None, "where the hub's files are kept")
    overwrite: bool = option(False, "replace a model folder that is already at work_dir")
    resume: bool = option(False, "keep the finished layers when the command is interrupted, and take them up when it is given again")
    eval_tokens: int = option(4096, "tokens of held-out text that perplexity is measured on; 0 = not measured", check=at_least(0))

    def __post_init__(self) -> None:
        self._check(lambda _, text: ConfigError(f"{type(self).__name__}: {text}"))
        if not self.work_dir.strip():
            raise ConfigError("work_dir is empty; give the folder that is to be written")


def _check_group(size: int) -> None:
    if size % 2:
        raise ConfigError(f"w_group_size={size} is odd; use 32, 64 or 128")


@remembers_given
@dataclass
class AwqConfig(LiteConfig):
    """How to make a 4-bit copy of a model with AWQ."""

    search_scale: bool = option(False, "search the scales and the clipping of every layer by its output error, instead of a fixed formula")
    w_bits: int = option(4, "bits of a weight", choices=(4,))
    w_group_size: int = option(128, "weights of one row that share a scale", check=between(2, 1 << 16))
    w_sym: bool = option(False, "symmetric rounding; not available: AWQ stores a zero point")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.w_sym:
            raise ConfigError("w_sym=True is not available: the AWQ layout stores a zero point for every group; leave --w-sym out")
        _check_group(self.w_group_size)


@remembers_given
@dataclass
class GptqConfig(LiteConfig):
    """How to make a 4-bit copy of a model with GPTQ."""

    w_bits: int = option(4, "bits of a weight", choices=(4,))
    w_group_size: int = option(128, "weights of one row that share a scale", check=between(2, 1 << 16))
    w_sym: bool = option(True, "symmetric rounding (what most fast GPTQ kernels want); False stores a zero point for every group")
    desc_act: bool = option(False, "group the inputs by importance (act-order): more accurate, slower to run, not for every kernel")
    damp: float = option(0.01, "share of the mean diagonal that is added to X^T X", check=between(1e-6, 1))

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_group(self.w_group_size)


@remembers_given
@dataclass
class SmoothQuantConfig(LiteConfig):
    """How to make a copy with 8-bit weights and activations."""

    search_scale: bool = option(False, "search how much of the outliers moves from activations into weights, by each layer's output error, instead of half")
    w_bits: int = option(8, "bits of a weight", choices=(8,))
    quant_dtype: str = option("int8", "type of weights and activations; fp8 is float8_e4m3fn", choices=tuple(QUANT_DTYPES))

    @property
    def stored_dtype(self) -> str:
        """The type's own name."""
        return QUANT_DTYPES[self.quant_dtype]


@remembers_given
@dataclass
class CalibrateConfig(LiteConfig):
    """What to measure of a model's activations."""

    search_scale: bool = option(False, "no effect here; accepted because the old command had it")
    w_bits: int = option(4, "no effect here; accepted because the old command had it", choices=(4, 8))
    w_group_size: int = option(128, "no effect here; accepted because the old command had it", check=between(2, 1 << 16))
