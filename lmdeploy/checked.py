"""Dataclasses of options that check themselves: every field has a default, a help text and a check, and remembers whether it was given.

A bad value raises with field, value and limit, when the object is built and when it is changed. This module must not import torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import os
from collections.abc import Callable
from dataclasses import field
from typing import Any, ClassVar, TypeVar

from lmdeploy.errors import ConfigError

C = TypeVar("C")
Check = Callable[[Any], str | None]


def option(default: Any, help: str, *, check: Check | None = None, choices: tuple[Any, ...] | None = None, flag: bool = True) -> Any:
    """A dataclass field with what flags and docs need. `check` returns what is allowed when the value is not."""
    meta = {"help": help, "check": check, "choices": choices, "flag": flag}
    return field(default=default, metadata=meta)


def at_least(low: float) -> Check:
    """None or a number >= low."""
    return lambda v: None if v is None or (is_number(v) and v >= low) else f"must be >= {low}"


def above(low: float) -> Check:
    """None or a finite number > low."""
    return lambda v: None if v is None or (is_number(v) and low < v < math.inf) else f"must be > {low} and finite"


def between(low: float, high: float) -> Check:
    """None or a number in [low, high]."""
    return lambda v: None if v is None or (is_number(v) and low <= v <= high) else f"must be in [{low}, {high}]"


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not (isinstance(value, float) and math.isnan(value))


def _bool(value: Any) -> Any:
    """True, False, 0, 1 or numpy's; never a text, because "false" would count as true."""
    numpys = type(value).__name__ in ("bool_", "bool")
    return bool(value) if numpys or (isinstance(value, int) and value in (0, 1)) else value


def _int(value: Any) -> Any:
    """Whole numbers of any library, and floats without a fraction (sliders and JSON send 512.0)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        return value
    whole = math.floor(value)
    return whole if whole == value else value


def _float(value: Any) -> Any:
    """Numbers of any library become Python's own; those keep their identity (see `_given_of_copy`)."""
    return value if isinstance(value, (bool, int, float)) or not isinstance(value, numbers.Real) else float(value)


def _str(value: Any) -> Any:
    """Paths become texts."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


#: KV cache policies: name -> the public surface's number. The last two are known there and not available here.
KV_POLICIES: dict[str, int] = {"none": 0, "int8": 8, "int4": 4, "fp8": 16, "fp8_e5m2": 17, "turbo_quant": 42}
QuantPolicy = int | str


def kv_policy(value: Any) -> Any:
    """A policy's name or number, also as a text -> its number, or 'k8v4', which has none; anything else as it is."""
    if isinstance(value, str):
        text = value.strip().lower()
        return int(text) if text.isdecimal() else KV_POLICIES.get(text, text)
    return _int(value)


def policy_problem(value: Any) -> str | None:
    if value in (0, 4, 8, 16, "k8v4"):
        return None
    return "is not available in this version of lmdeploy; use 0 (16 bit), 8 (int8), k8v4 (keys int8, values int4), 4 (int4) or 16 (fp8, CUDA only)"


#: annotation -> (Python types, what an error says, how equivalent values are brought into that type)
_KINDS: dict[str, tuple[tuple[type, ...], str, Callable[[Any], Any]]] = {
    "bool": ((bool,), "must be True or False", _bool),
    "int": ((int,), "must be a whole number", _int),
    "float": ((int, float), "must be a number", _float),
    "str": ((str,), "must be a text", _str),
    "list": ((list,), "must be a list", _list),
    "dict": ((dict,), "must be a dict", lambda v: v),
    "QuantPolicy": ((int, str), "must be 0, 8, 4, 'k8v4' or 'fp8'", kv_policy),
}


def shown(value: Any) -> str:
    """The value for an error line, shortened: a client may have sent a megabyte."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def remembers_given(cls: type[C]) -> type[C]:
    """Class decorator: `config.given` is the set of field names that the caller passed. Unknown names raise ConfigError."""
    original = cls.__init__
    cls._fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type, attr-defined]
    names = list(cls._fields)  # type: ignore[attr-defined]

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs = self._translate(kwargs)
        for name in kwargs:
            self._known(name)
        original(self, *args, **kwargs)
        given = frozenset(names[: len(args)]) | frozenset(kwargs)
        object.__setattr__(self, "given", _given_of_copy(self) if len(kwargs) == len(names) else given)

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


def _given_of_copy(config: Any) -> frozenset[str]:
    """The fields that differ from their default, for a call that names every field: so does dataclasses.replace.

    A float counts as the default only if it is that very object: an explicit temperature=0.8 stays given in copies.
    """
    fields = [(f.name, getattr(config, f.name), f.default) for f in dataclasses.fields(config)]
    return frozenset(name for name, value, default in fields if value != default or (isinstance(value, float) and value is not default))


class CheckedOptions:
    """Shared by the configs: every field is checked when set, in the constructor or later; `replace` keeps `given`.

    Attributes may be assigned, because users' scripts do it (`gen_config.top_p = 0.9`); the engine works on its own copy.
    """

    _fields: ClassVar[dict[str, dataclasses.Field[Any]]]  # by name: dataclasses.fields() makes a tuple anew at every call
    given: frozenset[str]  # set at the end of the constructor

    @classmethod
    def _translate(cls, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Historical spellings -> today's names; the default translates nothing."""
        return kwargs

    @classmethod
    def _known(cls, name: str) -> None:
        if name not in cls._fields:
            near = difflib.get_close_matches(name, cls._fields, 3)
            hint = f"; did you mean {' or '.join(near)}?" if near else f"; known: {', '.join(cls._fields)}"
            raise ConfigError(f"{cls.__name__} has no option '{name}'{hint}")

    def __setattr__(self, name: str, value: Any) -> None:
        if "given" not in self.__dict__:  # in the constructor
            object.__setattr__(self, name, value)
            return
        self._known(name)
        before = getattr(self, name)
        object.__setattr__(self, name, value)
        try:
            self.__post_init__()
        except BaseException:
            object.__setattr__(self, name, before)  # a refused value leaves the config as it was
            raise
        object.__setattr__(self, "given", self.given | {name})

    def __post_init__(self) -> None:
        """Check all fields."""

    def _check(self, error: Callable[[str, str], Exception]) -> None:
        for f in self._fields.values():
            if getattr(self, f.name) is f.default:
                continue  # defaults are right
            value, meta = self._typed(f, error), f.metadata
            if meta.get("choices") and value is not None and value not in meta["choices"]:
                raise error(f.name, f"{f.name}={shown(value)} is not one of {', '.join(map(str, meta['choices']))}")
            if value is None and "None" not in str(f.type):
                raise error(f.name, f"{f.name}=None is no value; leave it out for the default, {f.default!r}")
            if meta.get("check") and (problem := meta["check"](value)):
                raise error(f.name, f"{f.name}={shown(value)} {problem}")

    def _typed(self, f: dataclasses.Field[Any], error: Callable[[str, str], Exception]) -> Any:
        """The field's value, brought into its annotated type; equivalent values (numpy's numbers, 512.0) are taken over."""
        value = getattr(self, f.name)
        kind = str(f.type).split("[")[0].split(" ")[0]
        if value is None or kind not in _KINDS:
            return value
        types, expected, convert = _KINDS[kind]
        converted: Any = convert(value)
        if not isinstance(converted, types) or (isinstance(converted, bool) and bool not in types):
            raise error(f.name, f"{f.name}={shown(value)} {expected}")
        if converted is not value:
            object.__setattr__(self, f.name, converted)
        return converted

    def replace(self: C, **changes: Any) -> C:
        """A copy with changes; `given` grows by their names and forgets nothing."""
        changes = self._translate(changes)  # type: ignore[attr-defined]
        for name in changes:
            self._known(name)  # type: ignore[attr-defined]
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        copy = type(self)(**{**values, **changes})
        object.__setattr__(copy, "given", self.given | frozenset(changes))  # type: ignore[attr-defined]
        return copy
