"""The options of `lmdeploy lite compare`, once; the flags are made from them. This module must not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lmdeploy.checked import CheckedOptions, above, between, option, remembers_given
from lmdeploy.config import (
    BACKENDS,
    DTYPES,
    MAX_CPU_THREADS,
    EngineConfig,
    PytorchEngineConfig,
    TurbomindEngineConfig,
)
from lmdeploy.errors import ConfigError

#: after a policy: keys and values are not rotated before they are quantised
PLAIN = "-plain"


@dataclass(frozen=True, slots=True)
class Policy:
    """One way to store the KV cache, as the user names it: a `--quant-policy`, with '-plain' behind it for no rotation."""

    name: str

    def config(self, base: EngineConfig) -> EngineConfig:
        """`base` with this policy; raises ConfigError where the engine does not know it."""
        word = self.name.removesuffix(PLAIN)
        changed = base.replace(quant_policy=int(word) if word.isdecimal() else word)
        return changed.replace(kv_rotation=False) if word != self.name else changed

    @property
    def bits(self) -> str:
        """In words, for tables: '16 bit', 'int8', 'k8v4'."""
        word = self.name.removesuffix(PLAIN)
        return {"0": "16 bit", "8": "int8", "4": "int4", "16": "fp8"}.get(word, word) + (" plain" if word != self.name else "")


@remembers_given
@dataclass
class CompareConfig(CheckedOptions):
    """What to compare, on which text, and where the results go. Raises ConfigError naming field, value and limit."""

    policies: str = option("0,8,k8v4,4", "KV cache policies, separated by commas, as --quant-policy names them; 4-plain is int4 without rotation")
    text: str | None = option(None, "held-out text: a .txt, .md or .jsonl file, or a folder of them; its last tokens are scored (default: text of the package)")
    tokens: int = option(4096, "tokens of the text that are scored", check=between(64, 1 << 24))
    window: int = option(1024, "tokens that are computed together, without what stands before them", check=between(16, 1 << 20))
    json: str | None = option(None, "write the results to this JSON file")
    html: str | None = option(None, "write a page with table and plots to this file; it needs no network and no scripts")
    memory: float | None = option(
        None, "GiB that weights, workspace and KV cache may take, for the number of KV tokens (default: what is free now)", check=above(0)
    )
    speed: bool = option(True, "measure prefill and decode speed, too")
    dtype: str = option("auto", "type of weights and activations; auto: as the engine would choose", choices=DTYPES)
    device: str = option("auto", "where to compute; auto: cuda if there is one, else cpu", choices=("auto", "cuda", "cpu"))
    backend: str = option("turbomind", "turbomind: the fast kernels; pytorch: plain torch", choices=BACKENDS)
    cpu_threads: int | None = option(None, "threads of the CPU kernels; default: all cores of the process", check=between(1, MAX_CPU_THREADS))
    download_dir: str | None = option(None, "where the hub's files are kept")

    def __post_init__(self) -> None:
        self._check(lambda _, text: ConfigError(f"{type(self).__name__}: {text}"))
        for policy in self.kv_policies():
            policy.config(self.engine())
        for name in ("json", "html"):
            _check_target(name, getattr(self, name))

    def kv_policies(self) -> list[Policy]:
        """In the order given, each once; that of the reference, 0, always comes first."""
        words = [word.strip().lower() for word in self.policies.split(",") if word.strip()]
        if not words:
            raise ConfigError(f"policies={self.policies!r} names no KV policy; for example 0,8,k8v4,4")
        return [Policy(word) for word in dict.fromkeys(["0", *words])]

    def engine(self) -> EngineConfig:
        """What all engines have in common."""
        kind = PytorchEngineConfig if self.backend == "pytorch" else TurbomindEngineConfig
        return kind(dtype=self.dtype, device_type=self.device, cpu_threads=self.cpu_threads)


def _check_target(name: str, target: str | None) -> None:
    """A file that cannot be written is an error before the work, not after it."""
    if target is None:
        return
    path = Path(target).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(
            f"{name}={target!r}: {'is a folder' if path.is_dir() else f'there is no folder {str(path.parent)!r}'}; give a file in a folder that exists"
        )
