"""What an answer must look like: `Grammar`, and its public spelling, the `response_format` dict.

Only plain data and the bounds that need no library; whether a grammar can be compiled is found out by `engine/grammar_check.py`
before a request is accepted, and what it allows token by token is `engine/guided.py`'s.
"""

from __future__ import annotations

import json
from typing import Any, Literal, get_args

import msgspec

from lmdeploy.errors import RequestError

GrammarKind = Literal["json_object", "json_schema", "regex", "ebnf", "choice", "structural_tag"]

#: of a grammar's text, in UTF-8; how deep a schema may be nested; how many texts a choice may have
MAX_GRAMMAR_BYTES = 64 << 10
MAX_GRAMMAR_DEPTH = 64
MAX_CHOICES = 4096
MAX_AFTER = 256

#: type of a response_format -> (kind, key that holds its value); 'text' asks for nothing
_FORMATS: dict[str, tuple[GrammarKind, str]] = {
    "json_object": ("json_object", ""),
    "json_schema": ("json_schema", "json_schema"),
    "regex_schema": ("regex", "regex_schema"),
    "regex": ("regex", "regex"),
    "ebnf": ("ebnf", "ebnf"),
    "choice": ("choice", "choice"),
}


class Grammar(msgspec.Struct, frozen=True):
    """The form of an answer.

    `text`: for json_schema the schema as JSON; regex: the whole answer matches it; ebnf: a grammar whose start rule is `root` (GBNF, `::=`) or
    `start` (Lark, `:`); choice: a JSON list of texts; json_object: ''; structural_tag: JSON of
    {"mode": "auto"|"required", "parallel": bool, "triggers": [str], "tags": [{"begin": str, "schema": {...} | null, "end": str}]}.
    `after`: the answer is free until this text was generated; the grammar begins behind it. With `begin`, only an answer that begins with that text
    is free (reasoning that need not come); any other one is bound from its first token.
    """

    kind: GrammarKind
    text: str = ""
    after: str = ""
    begin: str = ""


def check_grammar(grammar: Any, param: str = "grammar") -> None:
    """Type and bounds; raises RequestError(code='invalid_grammar')."""
    if not isinstance(grammar, Grammar):
        raise RequestError(f"{param} must be a Grammar, not {type(grammar).__name__}", param=param)
    if grammar.kind not in get_args(GrammarKind):
        raise _invalid(f"kind={grammar.kind!r:.80} is not one of {', '.join(get_args(GrammarKind))}", param)
    try:
        size = len(grammar.text.encode("utf-8"))
        (grammar.after + grammar.begin).encode("utf-8")
    except UnicodeEncodeError as e:
        raise _invalid(f"it is not valid Unicode: a lone surrogate at position {e.start}", param) from None
    if size > MAX_GRAMMAR_BYTES:
        raise _invalid(f"it has {size} bytes; at most {MAX_GRAMMAR_BYTES} are allowed", param)
    for name, text in (("after", grammar.after), ("begin", grammar.begin)):
        if len(text) > MAX_AFTER:
            raise _invalid(f"{name!r} has {len(text)} characters; at most {MAX_AFTER} are allowed", param)
    if grammar.begin and not grammar.after:
        raise _invalid("'begin' needs 'after'", param)


def grammar_of(response_format: dict[str, Any] | None) -> Grammar | None:
    """The grammar that a `response_format` asks for, None for free text. Raises RequestError naming what is wrong."""
    if not response_format:
        return None
    name = response_format.get("type")
    if name == "text":
        _only(response_format, {"type"})
        return None
    if not isinstance(name, str) or name not in _FORMATS:
        raise RequestError(f"response_format.type={name!r:.80} is not one of text, {', '.join(_FORMATS)}", param="response_format")
    kind, key = _FORMATS[name]
    _only(response_format, {"type", key} - {""})
    grammar = Grammar(kind, _text(kind, key, response_format.get(key)))
    check_grammar(grammar, "response_format")
    return grammar


def wanted_grammar(gen: Any) -> Grammar | None:
    """The grammar that a GenerationConfig asks for, by either of its fields."""
    grammar: Grammar | None = gen.grammar if gen.grammar is not None else grammar_of(gen.response_format)
    return grammar


def _text(kind: GrammarKind, key: str, value: Any) -> str:
    if kind == "json_object":
        return ""
    if kind == "json_schema":
        if not isinstance(value, dict):
            raise RequestError("response_format.json_schema must be an object with 'name' and 'schema'", param="response_format")
        _only(value, {"name", "schema", "strict", "description"}, "json_schema.")
        schema = value.get("schema")
        if not isinstance(schema, (dict, bool)):
            raise RequestError("response_format.json_schema.schema must be a JSON schema (an object)", param="response_format")
        return json_text(schema)
    if kind == "choice":
        if not isinstance(value, list) or not value or not all(isinstance(v, str) and v for v in value):
            raise RequestError("response_format.choice must be a list of texts, none of them empty", param="response_format")
        return json_text(value)
    if not isinstance(value, str) or not value:
        raise RequestError(f"response_format.{key} must be a text that is not empty", param="response_format")
    return value


def json_text(value: Any) -> str:
    """Compact JSON; raises RequestError for what JSON cannot say, and for what is nested too deep."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise _invalid(f"it cannot be written as JSON: {e}", "response_format") from None


def _only(given: dict[str, Any], known: set[str], prefix: str = "") -> None:
    if unknown := [key for key in given if key not in known]:
        raise RequestError(
            f"response_format.{prefix}{unknown[0]!s:.80} is unknown; known: {', '.join(prefix + k for k in sorted(known))}", param="response_format"
        )


def _invalid(problem: str, param: str) -> RequestError:
    return RequestError(f"the grammar is refused: {problem}", param=param, code="invalid_grammar")
