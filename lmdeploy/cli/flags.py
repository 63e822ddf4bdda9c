"""Dataclass fields -> command-line flags, with the field's help, default, type and choices; and back to a config.

A flag that was not given leaves no trace, so a config still knows which options its user chose (`config.given`).
`--flag_name` equals `--flag-name`. A switch also takes a value: `--flag False` means False, never "given, thus True".
This module must not import torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

from lmdeploy.checked import QuantPolicy, kv_policy
from lmdeploy.config import BACKENDS, ChatTemplateConfig, EngineConfig, PytorchEngineConfig, TurbomindEngineConfig
from lmdeploy.errors import ConfigError
from lmdeploy.log import LEVELS, get_logger

C = TypeVar("C")

#: field -> flag, where the public command line has another word than the config
FLAG_NAMES = {"device_type": "device"}
#: options of EngineConfig that other systems' command lines have; the config itself says what it makes of them
COMPATIBLE = ("tp", "dp", "cp", "ep", "nnodes", "node_rank", "dist_init_addr", "devices", "distributed_executor_backend", "num_gpu_blocks", "empty_init")
#: engine options that this version obeys only with their neutral value, and that users look for in the help
_SHOWN_COMPATIBLE = ("tp",)
#: flags of the public surface that nothing here can obey yet: name -> its neutral values; any other value is an error
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "role": ("Hybrid",), "migration_backend": ("DLSlime",), "language_model_only": (False,), "disable_vision_encoder": (False,),
    "speculative_algorithm": (), "speculative_draft_model": (), "speculative_num_draft_tokens": ("1",), "cudagraph_capture_batch_sizes": (),
    "dllm_block_length": (), "dllm_unmasking_strategy": ("low_confidence_dynamic",), "dllm_denoising_steps": (), "dllm_confidence_threshold": ("0.85",),
    "prefix_cache_state_budget": ("0",), "prefix_cache_decode_state_interval": ("0",), "enable_microbatch": (False,), "enable_eplb": (False,),
    "enable_return_routed_experts": (False,),
}  # fmt: skip
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


class FlagParser(argparse.ArgumentParser):
    """An ArgumentParser that treats `_` and `-` alike, raises ConfigError, and names the nearest flag to an unknown one."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=_Help, argument_default=argparse.SUPPRESS)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse; every mistake raises ConfigError."""
        parsed, unknown = super().parse_known_args(self._normal(list(args or ())), namespace)
        if unknown:
            raise ConfigError(self._explain(unknown[0]))
        return typing.cast(argparse.Namespace, parsed)

    def error(self, message: str) -> NoReturn:
        """Called by argparse for bad values and missing arguments."""
        raise ConfigError(f"{message}; see {self.prog} --help")

    def _normal(self, words: list[str]) -> list[str]:
        """Flags with dashes; a switch takes the next word only when that word is a truth value."""
        out: list[str] = []
        for i, word in enumerate(words):
            if word == "--":
                return out + words[i:]
            if out and _is_switch(self, out[-1]) and word.lower() in _TRUE + _FALSE:
                out[-1] += f"={word}"
                continue
            if out and _is_switch(self, out[-1]):
                out[-1] += "=true"
            name, equals, value = word.partition("=")
            out.append(name.replace("_", "-") + equals + value if re.match(r"--[A-Za-z]", name) else word)
        if out and _is_switch(self, out[-1]):
            out[-1] += "=true"
        return out

    def _explain(self, word: str) -> str:
        name = word.partition("=")[0]
        if not name.startswith("-"):
            return f"unexpected argument {word!r}; see {self.prog} --help"
        visible = [f for a in self._actions if a.help != argparse.SUPPRESS for f in a.option_strings if f.startswith("--")]
        near = difflib.get_close_matches(name, visible, 2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"see {self.prog} --help"
        return f"unknown flag {name}; {hint}"


def _is_switch(parser: FlagParser, word: str) -> bool:
    action = parser._option_string_actions.get(word)
    return action is not None and action.nargs == "?"


class _Help(argparse.HelpFormatter):
    """Flag names in one column, help in the other, as wide as a usual terminal allows."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _format_usage(self, usage: Any, actions: Iterable[argparse.Action], groups: Any, prefix: Any) -> str:
        """Only the positional arguments: the flags stand below, and there are many."""
        names = [f"[{a.metavar or a.dest}]" if a.nargs == "?" else str(a.metavar or a.dest) for a in actions if not a.option_strings]
        return f"usage: {self._prog} {' '.join([*names, '[flags]'])}\n\n"


def truth(text: str) -> bool:
    """The value written after a switch."""
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(f"not valid JSON ({e})") from e
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"a JSON object is needed, not {type(value).__name__}")
    return value


@dataclasses.dataclass(frozen=True, slots=True)
class _Kind:
    """How the values of a type are written on the command line."""

    word: str
    parse: Callable[[str], Any]
    nargs: str | None = None


_KINDS: dict[Any, _Kind] = {
    bool: _Kind("True|False", truth, "?"),
    int: _Kind("INT", int),
    float: _Kind("FLOAT", float),
    str: _Kind("TEXT", str),
    dict: _Kind("JSON", _json_object),
    QuantPolicy: _Kind("{0,8,k8v4,4,fp8}", kv_policy),
}


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A number or `None`, which has a meaning of its own for some options (max_new_tokens)."""

    @functools.wraps(parse, assigned=("__name__",), updated=())  # argparse names the type in its error
    def number(text: str) -> Any:
        return None if text == "None" else parse(text)

    return number


def _kind(hint: Any) -> _Kind:
    """From a type hint such as `int | None` or `list[str]`."""
    if hint in _KINDS:
        return _KINDS[hint]
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kind = _kind(next(a for a in typing.get_args(hint) if a is not type(None)))
        return dataclasses.replace(kind, parse=_or_none(kind.parse)) if kind.parse in (int, float) else kind
    if typing.get_origin(hint) in (list, tuple):
        inner = _KINDS[typing.get_args(hint)[0]]
        return _Kind(inner.word, inner.parse, "*")
    return _KINDS[typing.get_origin(hint) or hint]


def add_config_flags(
    parser: argparse.ArgumentParser,
    config: type,
    *,
    title: str,
    skip: Sequence[str] = (),
    only: Sequence[str] | None = None,
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
) -> Any:
    """A flag for each field of a config class whose metadata says `flag` (or that is in `only`); `defaults` are shown instead of the field's own.

    Returns the argument group, for flags that belong there and are no field.
    """
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(config)
    for f in dataclasses.fields(config):
        wanted = f.name in only if only is not None else f.metadata.get("flag", False) and f.name not in skip
        if wanted:
            _add_field(group, f, _kind(hints[f.name]), defaults.get(f.name, f.default))
    return group


def _add_field(group: Any, f: dataclasses.Field[Any], kind: _Kind, default: Any, *, hidden: bool = False) -> None:
    names = [f.name] if f.name not in FLAG_NAMES else [FLAG_NAMES[f.name], f.name]
    choices = f.metadata.get("choices")
    text = f.metadata.get("help", "")
    if default is dataclasses.MISSING and callable(f.default_factory):
        default = " ".join(map(str, f.default_factory()))
    if default is not None and default is not dataclasses.MISSING and default != ():
        text += f" (default: {default})"
    group.add_argument(
        *("--" + n.replace("_", "-") for n in names),
        dest=f.name,
        type=kind.parse,
        nargs=kind.nargs,
        choices=choices,
        metavar="{" + ",".join(map(str, choices)) + "}" if choices else kind.word,
        help=argparse.SUPPRESS if hidden else text.replace("%", "%%"),
        **({"const": True} if kind.nargs == "?" else {}),
    )


def config_values(args: argparse.Namespace, config: type) -> dict[str, Any]:
    """The options of `config` that were given on the command line."""
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(config) if hasattr(args, f.name)}


def config_from(args: argparse.Namespace, config: type[C]) -> C:
    """A config of the flags that were given; its own checks raise ConfigError."""
    return config(**config_values(args, config))


# ---------------------------------------------------------------------- flags that several commands share


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of every command."""
    group = parser.add_argument_group("Program")
    group.add_argument("--log-level", choices=LEVELS, type=str.upper, metavar="LEVEL", help=f"{', '.join(LEVELS)} (default: WARNING)")
    group.add_argument("--debug", nargs="?", const=True, type=truth, metavar="True|False", help="show the trace of an error")


def add_model_flag(parser: argparse.ArgumentParser) -> None:
    """The model, and flags that say what it is."""
    parser.add_argument("model_path", nargs="?", default=None, metavar="MODEL", help="model folder or hub id (default: the embedded tiny-internlm2-chat)")


#: flags without help; `enable_metrics` is an engine option of the public surface too, but on the command line it is the server's
_OTHER_NAMES = [name for name in (*EngineConfig.ALIASES, *EngineConfig.NO_EFFECT) if name != "enable_metrics"]


def add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """Everything that makes an EngineConfig, and what other command lines of this kind accept."""
    group = add_config_flags(parser, EngineConfig, title="Engine", skip=_SHOWN_COMPATIBLE)
    group.add_argument(
        "--backend", choices=BACKENDS, metavar="{" + ",".join(BACKENDS) + "}", help="turbomind: the fast kernels; pytorch: plain torch (default: turbomind)"
    )
    compatible = parser.add_argument_group("Accepted for compatibility (anything but the neutral value is an error)")
    hints = typing.get_type_hints(EngineConfig)
    for f in dataclasses.fields(EngineConfig):
        if f.name in _SHOWN_COMPATIBLE:
            _add_field(compatible, f, _kind(hints[f.name]), f.default)
        elif f.name in COMPATIBLE:
            _add_field(compatible, f, _kind(hints[f.name]), f.default, hidden=True)
    compatible.add_argument("--adapters", nargs="*", metavar="[NAME=]PATH", help="LoRA adapters")
    compatible.add_argument("--trust-remote-code", nargs="?", const=True, type=truth, metavar="True|False", help="no remote code is ever run; only a notice")
    compatible.add_argument("--hf-overrides", type=_json_object, help=argparse.SUPPRESS)
    for name in _OTHER_NAMES:
        compatible.add_argument("--" + name.strip("_").replace("_", "-"), dest=name, type=_number_or_text, help=argparse.SUPPRESS)
    add_unsupported_flags(compatible, UNSUPPORTED)


def add_unsupported_flags(group: Any, table: dict[str, tuple[Any, ...]]) -> None:
    """Flags that are known, so that their error can say what is wrong with them; name -> neutral values."""
    for name, neutral in table.items():
        kind: dict[str, Any] = {"nargs": "?", "const": True, "type": truth} if neutral == (False,) else {}
        group.add_argument("--" + name.replace("_", "-"), dest=name, help=argparse.SUPPRESS, **kind)


def refuse_unsupported(args: argparse.Namespace, table: dict[str, tuple[Any, ...]]) -> None:
    """Raise ConfigError for a flag of the table that has another than a neutral value."""
    for name, neutral in table.items():
        value = getattr(args, name, None)
        if value is not None and value not in neutral:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is not available in this version of lmdeploy; leave it out")


def _number_or_text(text: str) -> Any:
    for parse in (int, float, truth):
        try:
            return parse(text)
        except (ValueError, argparse.ArgumentTypeError):
            continue
    return text


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The EngineConfig of the flags, as the class that `--backend` names."""
    refuse_unsupported(args, UNSUPPORTED)
    if getattr(args, "trust_remote_code", False):
        get_logger(__name__).warning("--trust-remote-code has no effect: lmdeploy never runs code from a model folder")
    values = config_values(args, EngineConfig)
    values.pop("model_name", None)  # --model-name is the command's own flag
    if "adapters" in values:
        values["adapters"] = _adapters(values["adapters"])
    for name in _OTHER_NAMES:
        if hasattr(args, name):
            values[name] = getattr(args, name)
    return (PytorchEngineConfig if getattr(args, "backend", None) == "pytorch" else TurbomindEngineConfig)(**values)


def _adapters(words: list[str]) -> dict[str, str] | None:
    """`path` alone is called default; several are `name=path`."""
    if not words:
        return None
    if len(words) == 1 and "=" not in words[0]:
        return {"default": words[0]}
    bad = next((w for w in words if "=" not in w), None)
    if bad is not None:
        raise ConfigError(f"--adapters {bad!r}: several adapters are written NAME=PATH")
    return dict(w.split("=", 1) for w in words)


def add_template_flags(parser: argparse.ArgumentParser) -> Any:
    """Flags that override the checkpoint's chat template; returns their group."""
    group = parser.add_argument_group("Chat template")
    group.add_argument("--chat-template", metavar="NAME|FILE", help="a built-in template (`lmdeploy list`) or a JSON file (default: the checkpoint's own)")
    group.add_argument("--meta-instruction", metavar="TEXT", help="the system prompt; '' = none (default: the template's own)")
    group.add_argument(
        "--cap",
        choices=("completion", "infilling", "chat", "python"),
        metavar="{completion,infilling,chat,python}",
        help="what the model can do (default: chat)",
    )
    return group


def template_config(args: argparse.Namespace, model_name: str | None = None) -> ChatTemplateConfig | None:
    """The template that the flags ask for; `model_name` is the old way to name a built-in one. None = the checkpoint's own."""
    chosen = getattr(args, "chat_template", None)
    if chosen is None:
        config = ChatTemplateConfig(model_name=model_name)
    elif chosen.endswith(".json") or chosen.lstrip().startswith("{") or "/" in chosen:
        config = ChatTemplateConfig.from_json(chosen)
    else:
        config = ChatTemplateConfig(model_name=chosen)
    changes = {"meta_instruction": getattr(args, "meta_instruction", None), "capability": getattr(args, "cap", None)}
    config = dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})
    return None if config == ChatTemplateConfig() else config
