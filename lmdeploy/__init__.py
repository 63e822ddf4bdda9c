"""The public names of lmdeploy, loaded when first used: `import lmdeploy` and `lmdeploy --help` must not wait for torch.

`lmdeploy.pipeline` is always the function, also after somebody imported the module `lmdeploy.pipeline`
(Python would then put the module in its place, and `from lmdeploy import pipeline` would depend on the order of imports).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from lmdeploy.version import __version__, version_info

#: public name -> the module that defines it
_HOMES = {
    "ChatTemplateConfig": "lmdeploy.config",
    "GenerationConfig": "lmdeploy.config",
    "Pipeline": "lmdeploy.pipeline",
    "PytorchEngineConfig": "lmdeploy.config",
    "Response": "lmdeploy.messages",
    "Tokenizer": "lmdeploy.text.tokenizer",
    "TurbomindEngineConfig": "lmdeploy.config",
    "VisionConfig": "lmdeploy.config",
    "client": "lmdeploy.serving.local",
    "pipeline": "lmdeploy.pipeline",
    "serve": "lmdeploy.serving.local",
}

__all__ = [
    "ChatTemplateConfig",
    "GenerationConfig",
    "Pipeline",
    "PytorchEngineConfig",
    "Response",
    "Tokenizer",
    "TurbomindEngineConfig",
    "VisionConfig",
    "__version__",
    "client",
    "pipeline",
    "serve",
    "version_info",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lmdeploy' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})


class _Package(ModuleType):
    """Keeps a public name when the import system wants to store the submodule of the same name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOMES:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
