"""From a spec to the model that runs it; the table of classes is in `names.py`, and a class is imported when it is used."""

from __future__ import annotations

import importlib

import torch

from lmdeploy.formats.choose import Formats, choose_formats
from lmdeploy.kernels.api import Kernels
from lmdeploy.layers.build import BuildContext
from lmdeploy.models.decoder import Decoder
from lmdeploy.models.names import class_of
from lmdeploy.parallel import Parallel
from lmdeploy.spec import ModelSpec


def model_class(spec: ModelSpec) -> type[Decoder]:
    """The class for a spec; an unknown architecture raises CheckpointError naming the nearest ones that are supported."""
    where = class_of(spec)
    module, _, attribute = where.partition(":")
    found = getattr(importlib.import_module(f"lmdeploy.models.{module}"), attribute)
    assert isinstance(found, type) and issubclass(found, Decoder), where
    return found


def build_model(
    spec: ModelSpec, dtype: torch.dtype, device: torch.device | str, kernels: Kernels, parallel: Parallel, formats: Formats | None = None
) -> Decoder:
    """The model of a spec with its weights still to be loaded: `model.load(source)`. `formats` is what config.json says when not given."""
    formats = formats or choose_formats(spec.quantization)
    return model_class(spec)(BuildContext(spec, parallel, kernels, dtype, torch.device(device), formats))
