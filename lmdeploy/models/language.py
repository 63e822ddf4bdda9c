"""The language model inside a folder: the whole of it, or the part of a vision-language model that is quantised while the rest is copied.

Composite folders nest its config (`llm_config`, `text_config`) and put its tensors below `language_model.` (InternVL, LLaVA of transformers) or
`model.language_model.` (transformers 5); the first LLaVA folders have a llama with a vision tower beside its layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lmdeploy.checkpoint.rename import Rename, RenamedSource, checkpoint_name
from lmdeploy.checkpoint.source import WeightSource, open_source
from lmdeploy.models.language_spec import is_nested, language_spec
from lmdeploy.models.registry import model_class
from lmdeploy.spec import ModelSpec

BELOW, INSIDE = "language_model.", "model.language_model."


@dataclass(frozen=True, slots=True)
class Language:
    """Facts of the language model, where its tensors are (`rules`: its names -> the folder's), and the folder's other modules."""

    spec: ModelSpec
    rules: tuple[Rename, ...] = ()
    inside: bool = False  # of a larger model
    others: tuple[str, ...] = ()

    def stored(self, name: str) -> str:
        """The folder's name of a tensor or module."""
        return checkpoint_name(name, self.rules)

    def open(self, folder: Path) -> WeightSource:
        """The folder's weights under the language model's names; tensors that are not its own have no name."""
        source = open_source(folder)
        return _LanguageSource(source, self) if self.inside else source


class _LanguageSource(RenamedSource):
    """Asked with the language model's names, and lists them."""

    def __init__(self, source: WeightSource, language: Language) -> None:
        super().__init__(source, language.rules)
        self._own = {own for name in source.names() if (own := _own_name(name, language.rules, language.spec)) is not None}

    def names(self) -> set[str]:
        """Names of the language model's tensors."""
        return self._own


def find_language(folder: Path) -> Language:
    """The language model of a folder. Raises CheckpointError as `load_spec` and `open_source` do."""
    spec = language_spec(folder)
    if not is_nested(folder):
        return Language(spec)
    names = open_source(folder).names()
    rules: tuple[Rename, ...] = ()
    if any(name.startswith(BELOW) for name in names):
        rules = (Rename("", BELOW),)
    elif any(name.startswith(INSIDE) for name in names):
        rules = (Rename(r"model\.", INSIDE),)
    strangers = sorted(name for name in names if _own_name(name, rules, spec) is None)
    return Language(spec, rules, True, tuple(dict.fromkeys(module for name in strangers if (module := _module(name)))))


def _own_name(name: str, rules: tuple[Rename, ...], spec: ModelSpec) -> str | None:
    """The language model's name of a tensor of the folder; None for one that is not its own."""
    names = model_class(spec).names
    if rules and rules[0].replacement == BELOW:
        return name.removeprefix(BELOW) if name.startswith(BELOW) else None
    if rules and name.startswith(INSIDE):
        return f"model.{name.removeprefix(INSIDE)}"
    stems = (names.head,) if rules else (names.embedding, names.layers, names.norm, names.head)
    return name if name.startswith(tuple(f"{stem}." for stem in stems)) else None


def _module(name: str) -> str:
    """The part of the larger model that a tensor belongs to: 'vision_model', 'model.mm_projector'; '' for a tensor in no module."""
    words = name.split(".")
    depth = 2 if words[0] == "model" else 1
    return ".".join(words[:depth]) if len(words) > depth else ""
